// open_safetensors and open_checkpoint: what they read, what they refuse, and that damaged files
// never lead outside the mapping.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "check_error.h"
#include "mutants.h"
#include "safetensors.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/error.h"

using namespace ssmcore;
namespace fs = std::filesystem;

namespace {

// A folder that removes itself.
class TempFolder {
 public:
  TempFolder() {
    std::string name = (fs::temp_directory_path() / "ssmcore-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~TempFolder() { fs::remove_all(path_); }

  std::string path(const std::string& name = "") const { return (path_ / name).string(); }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
    return path(name);
  }

 private:
  fs::path path_;
};

// A safetensors file of this header and these data bytes.
std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(uint64_t{header.size()} >> (8 * i));
  return bytes + header + data;
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

// A file of one F32 tensor "x" with this much data.
std::string one_tensor(const std::string& shape, const std::string& offsets, size_t bytes) {
  return safetensors_bytes(R"({"x":)" + entry("F32", shape, offsets) + "}",
                           std::string(bytes, '\1'));
}

std::map<std::string, TensorView> parse(const std::string& bytes) {
  return parse_safetensors(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), "test");
}

void check_refused(const std::string& bytes, const std::string& expected) {
  check_error(ErrorCode::invalid_checkpoint, expected, [&] { parse(bytes); });
}

constexpr char kConfig[] =
    R"({"model_type": "mamba", "hidden_size": 8, "vocab_size": 50, "eos_token_id": 1})";

}  // namespace

TEST_CASE("open_safetensors: shapes, dtypes and values") {
  const TempFolder folder;
  const float floats[] = {1.5f, -2, 3, 4, 5, 6};
  const int64_t scalar = -7;
  std::string data(sizeof floats + sizeof scalar + 2, '\0');
  std::memcpy(data.data(), floats, sizeof floats);
  std::memcpy(data.data() + sizeof floats, &scalar, sizeof scalar);
  const std::string path = folder.write(
      "a.safetensors", safetensors_bytes(R"({"__metadata__":{"format":"pt"},"scalar":)" +
                                             entry("I64", "[]", "[24,32]") + R"(,"matrix":)" +
                                             entry("F32", "[2,3]", "[0,24]") + R"(,"empty":)" +
                                             entry("F64", "[4,0,2]", "[32,32]") + R"(,"half":)" +
                                             entry("BF16", "[1,1,1,1,1,1]", "[32,34]") + "}   ",
                                         data));
  const TensorMap map = open_safetensors(path);
  CHECK(map.owner != nullptr);
  REQUIRE(map.tensors.size() == 4);

  const TensorView& matrix = map.tensors.at("matrix");
  CHECK(matrix.dtype == DType::float32);
  CHECK(matrix.device == Device{});
  CHECK(matrix.shape_string() == "(2, 3)");
  CHECK(matrix.is_contiguous());
  CHECK(std::memcmp(matrix.data, floats, sizeof floats) == 0);

  const TensorView& stored_scalar = map.tensors.at("scalar");
  CHECK(stored_scalar.dtype == DType::int64);
  CHECK(stored_scalar.rank == 1);
  CHECK(stored_scalar.shape[0] == 1);
  CHECK(std::memcmp(stored_scalar.data, &scalar, sizeof scalar) == 0);

  CHECK(map.tensors.at("empty").rank == 3);
  CHECK(map.tensors.at("empty").numel() == 0);
  CHECK(map.tensors.at("half").dtype == DType::bfloat16);
  CHECK(map.tensors.at("half").rank == 6);
}

TEST_CASE("open_safetensors: views live as long as their owner") {
  TensorMap map;
  {
    const TempFolder folder;
    map = open_safetensors(folder.write("a", one_tensor("[2]", "[0,8]", 8)));
  }
  CHECK(map.tensors.at("x").as<unsigned char>()[7] == 1);
}

TEST_CASE("open_safetensors: the smallest file") {
  CHECK(parse(safetensors_bytes("{}", "")).empty());
  CHECK(parse(safetensors_bytes(R"({"__metadata__":{}})", "")).empty());
}

TEST_CASE("open_safetensors: files that cannot be read") {
  const TempFolder folder;
  const auto check_not_found = [](const std::string& path, const std::string& reason) {
    check_error(ErrorCode::not_found, "open_safetensors: " + path + ": " + reason,
                [&] { open_safetensors(path); });
  };
  check_not_found(folder.path("none"), "No such file");
  check_not_found(folder.path(), "Is a directory");
  REQUIRE(mkfifo(folder.path("pipe").c_str(), 0600) == 0);
  check_not_found(folder.path("pipe"), "Not a regular file");
  check_error(ErrorCode::invalid_checkpoint, "got 0 bytes",
              [&] { open_safetensors(folder.write("empty", "")); });
}

TEST_CASE("parse_safetensors: truncated anywhere") {
  const std::string whole = one_tensor("[4]", "[0,16]", 16);
  REQUIRE(parse(whole).size() == 1);
  for (size_t size = 0; size < whole.size(); ++size) {
    // A copy of exactly this size, so that a sanitiser sees any read beyond it.
    const std::vector<uint8_t> cut(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(size));
    CHECK_THROWS_AS(parse_safetensors(cut.data(), cut.size(), "test"), Error);
  }
}

TEST_CASE("parse_safetensors: header lengths") {
  std::string bytes = one_tensor("[4]", "[0,16]", 16);
  for (const int top : {1, 0x7f, 0xff}) {
    bytes[7] = static_cast<char>(top);
    check_refused(bytes, "header length");
  }
  check_refused(safetensors_bytes("", "data"), "expected a JSON object");
  std::string big(100'000'001 + 8, ' ');
  big.replace(0, 10, std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10));
  check_refused(big, "header length 100000001 does not fit");
}

TEST_CASE("parse_safetensors: headers that are not the format's JSON") {
  const auto check_header = [](const std::string& header, const std::string& expected) {
    check_refused(safetensors_bytes(header, ""), expected);
  };
  for (const char* header : {"[]", "3", " {}", "\xef\xbb\xbf{}"}) {
    check_header(header, "expected a JSON object");
  }
  for (const char* header : {"{", "{}{}", R"({"x")", "{\"\xff\":{}}", R"({"x":Infinity})"}) {
    check_header(header, "not valid JSON");
  }
  check_header(std::string("{}\0\0", 4), "zero byte");
  for (const char* value : {"null", "true", "1", "-1", "1.5", "\"F32\"", "[]"}) {
    check_header(R"({"x":)" + std::string(value) + "}", "tensor \"x\": expected an object, got ");
  }
  check_header(R"({"x":{}})", "tensor \"x\": has no dtype");
  check_header(R"({"x":{"dtype":"F32"}})", "has no shape");
  check_header(R"({"x":{"dtype":"F32","shape":[0]}})", "has no data_offsets");
  check_header(R"({"x":{"dtype":"F32","dtype":"F32"}})", "dtype occurs twice");
  check_header(R"({"x":{"shape":[0],"shape":[0]}})", "shape occurs twice");
  check_header(R"({"x":{"layout":"C"}})", "got \"layout\"");
  check_header(R"({"x":{"dtype":{"a":1}}})", "expected a string as dtype, got an object");
  check_header(R"({"__metadata__":{"a":1}})", "__metadata__");
  check_header(R"({"__metadata__":{"a":{}}})", "__metadata__");
  check_header(R"({"__metadata__":[]})", "__metadata__");
}

TEST_CASE("parse_safetensors: deep nesting ends early") {
  for (const char* prefix : {"{\"x\":", "{\"x\":{\"shape\":", "{\"__metadata__\":"}) {
    std::string brackets, objects;
    for (int i = 0; i < 1'000'000; ++i) brackets += "[", objects += "{\"a\":";
    CHECK_THROWS_AS(parse(safetensors_bytes(prefix + brackets, "")), Error);
    CHECK_THROWS_AS(parse(safetensors_bytes(prefix + objects, "")), Error);
  }
}

TEST_CASE("parse_safetensors: dtypes") {
  for (const char* dtype : {"U8", "BOOL", "F8_E4M3", "", "f32"}) {
    check_refused(safetensors_bytes(R"({"x":)" + entry(dtype, "[1]", "[0,1]") + "}", "1"),
                  "tensor \"x\": dtype \"" + std::string(dtype) + "\" is not supported");
  }
}

TEST_CASE("parse_safetensors: shapes") {
  const auto check_shape = [](const std::string& shape, const std::string& expected) {
    check_refused(one_tensor(shape, "[0,4]", 4), expected);
  };
  for (const char* shape : {"[-1]", "[1.0]", "[1e0]", "[true]", "[null]", "[\"1\"]", "[[1]]",
                            "[{}]", "1", "{}", "null", "[18446744073709551617]"}) {
    check_shape(shape, "tensor \"x\": expected non-negative integers as shape, got ");
  }
  check_shape("[1,1,1,1,1,1,1]", "at most 6 dimensions");
  check_shape("[2]", "expected 8 bytes for float32 of shape (2,), got data_offsets [0, 4]");
  check_shape("[0]", "expected 0 bytes");
  // Sizes that wrap around to 4 bytes, or would without the empty dimension.
  for (const char* shape :
       {"[4611686018427387905]", "[4294967296,4294967296]",
        "[18446744073709551615,18446744073709551615]", "[0,4294967296,4294967296]",
        "[9223372036854775807]", "[18446744073709551615]"}) {
    check_shape(shape, "is too large");
  }
}

TEST_CASE("parse_safetensors: offsets") {
  const auto check_offsets = [](const std::string& offsets, const std::string& expected) {
    check_refused(one_tensor("[1]", offsets, 4), expected);
  };
  check_offsets("[4,0]", "reversed");
  check_offsets("[0,8]", "beyond the file, which has 4 bytes");
  check_offsets("[18446744073709551612,18446744073709551615]", "beyond the file");
  check_offsets("[0]", "two data_offsets");
  check_offsets("[0,4,4]", "at most 2 data_offsets");
  check_offsets("[]", "two data_offsets");
  check_offsets("[-4,0]", "data_offsets, got -4");
  check_offsets("[0.0,4.0]", "data_offsets, got 0.0");
}

TEST_CASE("parse_safetensors: tensors lie end to end") {
  const auto two = [](const std::string& first, const std::string& second, size_t bytes) {
    return safetensors_bytes(
        R"({"a":)" + entry("F16", "[2]", first) + R"(,"b":)" + entry("F16", "[2]", second) + "}",
        std::string(bytes, '\0'));
  };
  CHECK(parse(two("[0,4]", "[4,8]", 8)).size() == 2);
  CHECK(parse(two("[4,8]", "[0,4]", 8)).size() == 2);
  check_refused(two("[0,4]", "[2,6]", 6), "tensor \"b\": overlaps");
  check_refused(two("[0,4]", "[0,4]", 4), "overlaps");
  check_refused(two("[0,4]", "[6,10]", 10), "tensor \"b\": leaves a hole");
  check_refused(two("[2,6]", "[6,10]", 10), "tensor \"a\": leaves a hole");
  check_refused(two("[0,4]", "[4,8]", 9), "expected 8 bytes of data, got 9");
  check_refused(safetensors_bytes(R"({"a":)" + entry("F16", "[2]", "[0,4]") + R"(,"a":)" +
                                      entry("F16", "[2]", "[4,8]") + "}",
                                  std::string(8, '\0')),
                "tensor \"a\": occurs twice");
}

TEST_CASE("open_checkpoint: the bundled model") {
  const Checkpoint checkpoint = open_checkpoint(SSMCORE_TEST_MODEL_DIR);
  CHECK(checkpoint.config.d_model == 256);
  CHECK(checkpoint.config.dim == 512);
  CHECK(checkpoint.config.layers.size() == 8);
  CHECK(checkpoint.config.eos_token_ids == std::vector<int64_t>{0});
  const auto& tensors = checkpoint.tensors.tensors;
  CHECK(tensors.at("backbone.embeddings.weight").shape_string() == "(256, 256)");
  CHECK(tensors.at("backbone.embeddings.weight").dtype == DType::bfloat16);
  CHECK(tensors.at("backbone.layers.7.mixer.A_log").shape_string() == "(512, 16)");
  CHECK(tensors.at("backbone.layers.7.mixer.conv1d.weight").shape_string() == "(512, 1, 4)");
}

TEST_CASE("open_checkpoint: what is missing is named") {
  const TempFolder folder;
  const auto check_not_found = [](const std::string& path, const std::string& expected) {
    check_error(ErrorCode::not_found, expected, [&] { open_checkpoint(path); });
  };
  check_not_found("", "No such file");
  check_not_found(folder.path("none"), folder.path("none") + ": No such file");
  check_not_found(folder.write("file", ""), "is not a folder");
  check_not_found(folder.path(), "config.json: No such file");
  folder.write("config.json", kConfig);
  check_not_found(folder.path(), "has neither model.safetensors nor model.safetensors.index.json");
  folder.write("pytorch_model.bin", "");
  check_not_found(folder.path(), "pytorch_model.bin, which only the Python package reads");
  fs::create_symlink("nowhere", folder.path("model.safetensors"));
  check_not_found(folder.path(), "model.safetensors: No such file");
  fs::remove(folder.path("config.json"));
  fs::create_directory(folder.path("config.json"));
  check_not_found(folder.path(), "config.json: Is a directory");
}

TEST_CASE("open_checkpoint: damaged files are named") {
  const TempFolder folder;
  const auto check_invalid = [&](const std::string& expected) {
    check_error(ErrorCode::invalid_checkpoint, expected, [&] { open_checkpoint(folder.path()); });
  };
  folder.write("model.safetensors", one_tensor("[1]", "[0,4]", 4));
  folder.write("config.json", R"({"model_type": "mamba", "hidden_size": -1})");
  check_invalid("open_checkpoint: " + folder.path("config.json") + ": hidden_size");
  folder.write("config.json", "");
  check_invalid("config.json: not valid JSON");
  folder.write("config.json", kConfig);
  CHECK(open_checkpoint(folder.path()).tensors.tensors.size() == 1);
  folder.write("generation_config.json", R"({"eos_token_id": "x"})");
  check_invalid("generation_config.json: eos_token_id");
  folder.write("generation_config.json", "{}");
  folder.write("model.safetensors", one_tensor("[2]", "[0,4]", 4));
  check_invalid("model.safetensors: tensor \"x\"");
}

TEST_CASE("open_checkpoint: generation_config.json decides the end-of-sequence ids") {
  const TempFolder folder;
  folder.write("config.json", kConfig);
  folder.write("model.safetensors", one_tensor("[1]", "[0,4]", 4));
  const auto ids = [&] { return open_checkpoint(folder.path()).config.eos_token_ids; };
  CHECK(ids() == std::vector<int64_t>{1});
  folder.write("generation_config.json", R"({"eos_token_id": [2, 3]})");
  CHECK(ids() == std::vector<int64_t>{2, 3});
  folder.write("generation_config.json", R"({"eos_token_id": 4, "temperature": Infinity})");
  CHECK(ids() == std::vector<int64_t>{4});
  for (const char* none : {R"({"eos_token_id": null})", "{}"}) {
    folder.write("generation_config.json", none);
    CHECK(ids().empty());
  }
}

TEST_CASE("open_checkpoint: shards") {
  const TempFolder folder;
  folder.write("config.json", kConfig);
  const auto write_shard = [&](const std::string& file, const char* a, const char* b, char fill) {
    folder.write(file, safetensors_bytes('{' + ('"' + std::string(a)) + R"(":)" +
                                             entry("F32", "[1]", "[0,4]") + ",\"" + b + R"(":)" +
                                             entry("F32", "[1]", "[4,8]") + "}",
                                         std::string(8, fill)));
  };
  const auto write_index = [&](const std::string& weight_map) {
    folder.write("model.safetensors.index.json",
                 R"({"metadata": {"total_size": 16}, "weight_map": )" + weight_map + "}");
  };
  const auto check_invalid = [&](const std::string& expected) {
    check_error(ErrorCode::invalid_checkpoint, expected, [&] { open_checkpoint(folder.path()); });
  };
  write_shard("one", "a", "b", 1);
  write_shard("two", "b", "c", 2);

  // Both hold a "b"; the index says which counts. What it does not list is left out.
  write_index(R"({"c": "two", "b": "two"})");
  CHECK(open_checkpoint(folder.path()).tensors.tensors.size() == 2);
  write_index(R"({"a": "one", "b": "two", "c": "two"})");
  const TensorMap tensors = open_checkpoint(folder.path()).tensors;
  CHECK(tensors.tensors.size() == 3);
  CHECK(tensors.tensors.at("a").as<char>()[3] == 1);
  CHECK(tensors.tensors.at("b").as<char>()[3] == 2);

  write_index(R"({"c": "one"})");
  check_invalid("one: has no tensor \"c\"");
  write_index(R"({"a": "three"})");
  check_error(ErrorCode::not_found, "three: No such file", [&] { open_checkpoint(folder.path()); });
  write_index(R"({"a": "one", "a": "two"})");
  check_invalid("\"a\" occurs twice");
  for (const char* name : {"\"../one\"", "\"/one\"", "\"a/one\"", "\"..\"", "\".\"", "\"\"",
                           "\"one\\u0000\"", "\"a\\\\one\"", "3", "null", "[]"}) {
    write_index(R"({"a": )" + std::string(name) + "}");
    check_invalid("tensor \"a\": expected the name of a file in the folder, got ");
  }
  for (const char* weight_map : {"null", "[]", "\"one\""}) {
    write_index(weight_map);
    check_invalid("weight_map");
  }
  folder.write("model.safetensors.index.json", "[]");
  check_invalid("index.json: expected a JSON object");

  // A whole file goes before shards.
  folder.write("model.safetensors", one_tensor("[1]", "[0,4]", 4));
  CHECK(open_checkpoint(folder.path()).tensors.tensors.count("x") == 1);
}

TEST_CASE("parse_safetensors: a mutated file is refused or read within its bounds") {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":)" + entry("F32", "[8,6]", "[0,192]") + R"(,"b":)" +
      entry("BF16", "[4]", "[192,200]") + R"(,"c":)" + entry("I64", "[]", "[200,208]") +
      R"(,"d":)" + entry("F16", "[0,7]", "[208,208]") + "}";
  const std::string whole = safetensors_bytes(header, std::string(208, '\x5a'));
  const size_t data_begin = 8 + header.size();
  const char* const numbers[] = {"-1",
                                 "0",
                                 "1",
                                 "7",
                                 "24.0",
                                 "1e2",
                                 "65536",
                                 "4294967296",
                                 "4611686018427387905",
                                 "9223372036854775807",
                                 "18446744073709551615",
                                 "99999999999999999999",
                                 "[",
                                 "null",
                                 "\"\""};

  std::mt19937 random(20240601);
  const auto below = [&](size_t n) {
    return std::uniform_int_distribution<size_t>(0, n - 1)(random);
  };
  const int rounds = num_mutants();
  int refused = 0, read = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = whole;
    bool header_touched = false;
    for (size_t edit = 0, edits = 1 + below(3); edit < edits && !bytes.empty(); ++edit) {
      const size_t at = below(bytes.size());
      switch (below(5)) {
        case 0:  // flip bits
          bytes[at] = static_cast<char>(bytes[at] ^ (1 + below(255)));
          header_touched |= at < data_begin;
          break;
        case 1:  // truncate
          bytes.resize(at);
          header_touched = true;
          break;
        case 2:  // insert
          bytes.insert(at, 1 + below(9), static_cast<char>(below(256)));
          header_touched = true;
          break;
        case 3:  // copy a piece of the file over another
          bytes.replace(at, 1 + below(30), bytes.substr(below(bytes.size()), below(30)));
          header_touched = true;
          break;
        default: {  // replace a number, and usually say the header's new length
          const size_t begin = bytes.find_first_of("0123456789", std::min(at, data_begin));
          if (begin == std::string::npos) break;
          const size_t end = bytes.find_first_not_of("0123456789", begin);
          const std::string number = numbers[below(std::size(numbers))];
          const size_t old = std::min(end, bytes.size()) - begin;
          bytes.replace(begin, old, number);
          if (below(4) != 0) bytes[0] = static_cast<char>(bytes[0] + number.size() - old);
          header_touched = true;
        }
      }
    }
    // A copy of exactly this size, so that a sanitiser sees any read beyond it.
    const std::vector<uint8_t> copy(bytes.begin(), bytes.end());
    try {
      size_t total = 0;
      for (const auto& [name, view] : parse_safetensors(copy.data(), copy.size(), "test")) {
        const size_t size = static_cast<size_t>(view.numel()) * dtype_size(view.dtype);
        const auto* data = view.as<const uint8_t>();
        REQUIRE(view.rank >= 1);
        REQUIRE(data >= copy.data());
        REQUIRE(data + size <= copy.data() + copy.size());
        total += size;
      }
      REQUIRE(total < copy.size());
      ++read;
    } catch (const Error& error) {
      REQUIRE_MESSAGE(header_touched, error.what());  // the data alone can hold anything
      REQUIRE(error.code() == ErrorCode::invalid_checkpoint);
      ++refused;
    }
  }
  CHECK(read > 1'000);
  CHECK(refused > 10'000);
}
