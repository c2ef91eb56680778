// save_checkpoint: a model folder as transformers writes it.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "ssmcore/checkpoint.h"
#include "ssmcore/error.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kEmbedding[] = "backbone.embeddings.weight";
constexpr char kHead[] = "lm_head.weight";

[[noreturn]] void fail(ErrorCode code, const std::string& reason) {
  throw Error(code, "save_checkpoint: " + reason);
}

[[noreturn]] void fail_to_write(const fs::path& path, const std::string& reason) {
  fail(ErrorCode::not_found, path.string() + ": " + reason);
}

// A file that has its name only once it is whole.
class NewFile {
 public:
  explicit NewFile(const fs::path& path) : path_(path) {
    static std::atomic<unsigned> count{0};
    temporary_ = path.string() + ".tmp-" + std::to_string(::getpid()) + "-" +
                 std::to_string(count.fetch_add(1));
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    check(fd_ >= 0);
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    if (fd_ < 0) return;
    ::close(fd_);
    ::unlink(temporary_.c_str());
  }

  void write(const void* data, size_t bytes) {
    const char* next = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(fd_, next, bytes);
      if (written < 0 && errno == EINTR) continue;
      check(written >= 0);
      next += written;
      bytes -= static_cast<size_t>(written);
    }
  }
  void write(const std::string& text) { write(text.data(), text.size()); }

  // All bytes are on the disk before the name is.
  void flush() const { check(::fsync(fd_) == 0); }
  void publish() {
    check(::rename(temporary_.c_str(), path_.c_str()) == 0);
    ::close(fd_);
    fd_ = -1;
  }

 private:
  void check(bool succeeded) const {
    if (!succeeded) fail_to_write(path_, std::strerror(errno));
  }

  fs::path path_;
  std::string temporary_;
  int fd_ = -1;
};

// The shortest decimal that is this float: 1e-5 and not 9.999999747e-06.
json shortest(float value) {
  char text[32];
  *std::to_chars(text, text + sizeof(text) - 1, value).ptr = '\0';
  return std::strtod(text, nullptr);
}

json eos_token_id(const ModelConfig& config) {
  if (config.eos_token_ids.empty()) return nullptr;
  if (config.eos_token_ids.size() == 1) return config.eos_token_ids.front();
  return config.eos_token_ids;
}

json config_json(const ModelConfig& config, DType dtype) {
  const bool is_falcon = config.mixer_norm_eps > 0;
  json object = {
      {"architectures", {is_falcon ? "FalconMambaForCausalLM" : "MambaForCausalLM"}},
      {"model_type", config.model_type},
      {"dtype", dtype_name(dtype)},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.d_model},
      {"num_hidden_layers", config.layers.size()},
      {"expand", std::max<int64_t>(1, config.dim / config.d_model)},
      {"intermediate_size", config.dim},  // overrules expand, which need not be whole
      {"state_size", config.dstate},
      {"conv_kernel", config.width},
      {"time_step_rank", config.dt_rank},
      {"layer_norm_epsilon", shortest(config.norm_eps)},
      {"hidden_act", "silu"},
      {"residual_in_fp32", true},
      {"use_bias", config.use_bias},
      {"use_conv_bias", config.use_conv_bias},
      {"tie_word_embeddings", config.tie_embeddings},
      {"eos_token_id", eos_token_id(config)},
  };
  if (is_falcon) object["mixer_rms_eps"] = shortest(config.mixer_norm_eps);
  return object;
}

const char* safetensors_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "F32";
    case DType::bfloat16:
      return "BF16";
    case DType::float16:
      return "F16";
    default:
      fail(ErrorCode::invalid_argument, std::string("a tensor has dtype ") + dtype_name(dtype) +
                                            ", expected float32, bfloat16 or float16");
  }
}

using NamedTensor = std::pair<std::string, TensorView>;

size_t bytes_of(const TensorView& tensor) {
  return static_cast<size_t>(tensor.numel()) * dtype_size(tensor.dtype);
}

// What transformers stores, in the order of its files: larger elements first, so that every tensor
// is aligned, then by name.
std::vector<NamedTensor> tensors_to_write(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config;
  std::vector<NamedTensor> tensors;
  for (auto [stored_name, tensor] : checkpoint.tensors.tensors) {
    const std::string name = transformers_name(stored_name);
    const bool is_head = name == kHead;
    if (is_head && config.tie_embeddings) continue;
    const bool is_by_token = is_head || name == kEmbedding;
    if (is_by_token && tensor.rank == 2 && tensor.shape[0] == config.padded_vocab_size)
      tensor = tensor.slice(0, 0, config.vocab_size);
    if (!tensor.is_contiguous())
      fail(ErrorCode::invalid_argument, "tensor " + stored_name + " is not contiguous");
    tensors.emplace_back(name, tensor);
  }
  std::sort(tensors.begin(), tensors.end(), [](const NamedTensor& a, const NamedTensor& b) {
    return std::make_tuple(-static_cast<int>(dtype_size(a.second.dtype)), std::cref(a.first)) <
           std::make_tuple(-static_cast<int>(dtype_size(b.second.dtype)), std::cref(b.first));
  });
  return tensors;
}

void write_safetensors(const std::vector<NamedTensor>& tensors, NewFile& file) {
  json header = {{"__metadata__", {{"format", "pt"}}}};
  size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const size_t end = offset + bytes_of(tensor);
    header[name] = {
        {"dtype", safetensors_name(tensor.dtype)},
        {"shape", std::vector<int64_t>(tensor.shape, tensor.shape + tensor.rank)},
        {"data_offsets", {offset, end}},
    };
    offset = end;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string length;
  for (int i = 0; i < 8; ++i) length += static_cast<char>(uint64_t{text.size()} >> (8 * i));
  file.write(length + text);
  for (const auto& [name, tensor] : tensors) file.write(tensor.data, bytes_of(tensor));
}

}  // namespace

void save_checkpoint(const Checkpoint& checkpoint, const std::string& folder) {
  const fs::path path(folder);
  std::error_code error;
  fs::create_directories(path, error);
  if (error) fail_to_write(path, error.message());
  const std::vector<NamedTensor> tensors = tensors_to_write(checkpoint);
  const auto embedding =
      std::find_if(tensors.begin(), tensors.end(),
                   [](const NamedTensor& tensor) { return tensor.first == kEmbedding; });
  const DType dtype = embedding == tensors.end() ? DType::float32 : embedding->second.dtype;

  NewFile weights(path / "model.safetensors"), config(path / "config.json"),
      generation_config(path / "generation_config.json");
  write_safetensors(tensors, weights);
  config.write(config_json(checkpoint.config, dtype).dump(2) + "\n");
  generation_config.write(json{{"eos_token_id", eos_token_id(checkpoint.config)}}.dump(2) + "\n");
  for (const NewFile* file : {&weights, &config, &generation_config}) file->flush();
  for (NewFile* file : {&weights, &config, &generation_config}) file->publish();
}

}  // namespace ssmcore
