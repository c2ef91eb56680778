// save_checkpoint: what is written is what is read.
#include <doctest/doctest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "check_error.h"
#include "ssmcore/checkpoint.h"

using namespace ssmcore;
namespace fs = std::filesystem;

namespace {

// A folder that removes itself.
struct TempFolder {
  fs::path path;
  TempFolder() {
    std::string name = (fs::temp_directory_path() / "ssmcore-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~TempFolder() { fs::remove_all(path); }
};

std::string bytes_of(const TensorView& tensor) {
  return {tensor.as<const char>(), static_cast<size_t>(tensor.numel()) * dtype_size(tensor.dtype)};
}

void check_same(const TensorMap& actual, const TensorMap& expected) {
  REQUIRE(actual.tensors.size() == expected.tensors.size());
  for (const auto& [name, tensor] : expected.tensors) {
    const TensorView& saved = actual.tensors.at(name);
    CHECK(saved.dtype == tensor.dtype);
    CHECK(saved.shape_string() == tensor.shape_string());
    CHECK(bytes_of(saved) == bytes_of(tensor));
  }
}

}  // namespace

TEST_CASE("save_checkpoint: what is saved is what was opened") {
  const TempFolder temp;
  const std::string folder = (temp.path / "new" / "folder").string();
  const Checkpoint original = open_checkpoint(SSMCORE_TEST_MODEL_DIR);
  for (int times = 0; times < 2; ++times) {  // into a new folder, then over it
    save_checkpoint(original, folder);
    const Checkpoint saved = open_checkpoint(folder);
    check_same(saved.tensors, original.tensors);
    CHECK(saved.config.model_type == "mamba");
    CHECK(saved.config.d_model == original.config.d_model);
    CHECK(saved.config.layers == original.config.layers);
    CHECK(saved.config.dim == original.config.dim);
    CHECK(saved.config.dstate == original.config.dstate);
    CHECK(saved.config.norm_eps == original.config.norm_eps);
    CHECK(saved.config.eos_token_ids == original.config.eos_token_ids);
  }
  size_t files = 0;
  for (const auto& file : fs::directory_iterator(folder)) files += file.is_regular_file();
  CHECK(files == 3);
}

TEST_CASE("save_checkpoint: upstream's names, padding and tied head become transformers'") {
  const TempFolder temp;
  std::vector<float> rows(8 * 2);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i);
  Checkpoint checkpoint;
  checkpoint.config.format = CheckpointFormat::upstream;
  checkpoint.config.model_type = "mamba";
  checkpoint.config.d_model = 2;
  checkpoint.config.vocab_size = 5;
  checkpoint.config.padded_vocab_size = 8;
  checkpoint.config.layers = {MixerType::mamba};
  checkpoint.config.dim = 3;
  checkpoint.config.dt_rank = 1;
  const TensorView table(rows.data(), DType::float32, {8, 2});
  checkpoint.tensors.tensors = {{"backbone.embedding.weight", table}, {"lm_head.weight", table}};
  save_checkpoint(checkpoint, temp.path.string());

  Checkpoint saved = open_checkpoint(temp.path.string());
  CHECK(saved.config.vocab_size == 5);
  CHECK(saved.config.dim == 3);  // which is no multiple of d_model
  CHECK(saved.config.eos_token_ids.empty());
  REQUIRE(saved.tensors.tensors.size() == 1);
  const TensorView embedding = saved.tensors.tensors.at("backbone.embeddings.weight");
  CHECK(embedding.shape_string() == "(5, 2)");
  CHECK(std::memcmp(embedding.data, rows.data(), 10 * sizeof(float)) == 0);

  checkpoint.config.tie_embeddings = false;
  save_checkpoint(checkpoint, temp.path.string());
  saved = open_checkpoint(temp.path.string());
  CHECK(saved.tensors.tensors.at("lm_head.weight").shape_string() == "(5, 2)");

  checkpoint.tensors.tensors["x"] = table.transpose(0, 1);
  check_error(ErrorCode::invalid_argument, "tensor x is not contiguous",
              [&] { save_checkpoint(checkpoint, temp.path.string()); });
  checkpoint.tensors.tensors["x"] = TensorView(rows.data(), DType::int64, {2});
  check_error(ErrorCode::invalid_argument, "dtype int64",
              [&] { save_checkpoint(checkpoint, temp.path.string()); });
  CHECK(open_checkpoint(temp.path.string()).tensors.tensors.size() == 2);  // the one before
}

TEST_CASE("save_checkpoint: a place that cannot be written") {
  const TempFolder temp;
  const Checkpoint checkpoint = open_checkpoint(SSMCORE_TEST_MODEL_DIR);
  check_error(ErrorCode::not_found, "save_checkpoint: ", [&] {
    save_checkpoint(checkpoint, std::string(SSMCORE_TEST_MODEL_DIR) + "/config.json");
  });
  fs::create_directories(temp.path / "config.json");
  check_error(ErrorCode::not_found, "config.json: Is a directory",
              [&] { save_checkpoint(checkpoint, temp.path.string()); });
  for (const auto& file : fs::directory_iterator(temp.path))
    CHECK(file.path().string().find(".tmp-") == std::string::npos);
}
