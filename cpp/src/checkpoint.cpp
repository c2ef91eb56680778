#include "ssmcore/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "json_reader.h"
#include "mapped_file.h"
#include "model_config_json.h"
#include "ssmcore/error.h"

namespace ssmcore {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kFunction[] = "open_checkpoint";
constexpr char kConfig[] = "config.json";
constexpr char kGenerationConfig[] = "generation_config.json";
constexpr char kWeights[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";
constexpr char kPickle[] = "pytorch_model.bin";

// Broken links and unreadable files count as there, so that opening them tells what is wrong.
bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::symlink_status(path, ignored).type() != fs::file_type::not_found;
}

std::string source_of(const fs::path& path) {
  return kFunction + (": " + path.string());
}

[[noreturn]] void fail(ErrorCode code, const fs::path& path, const std::string& reason) {
  throw Error(code, source_of(path) + ": " + reason);
}

json read_json(const fs::path& path) {
  const MappedFile file(path.string(), kFunction);
  return parse_json_object(file.text(), source_of(path));
}

bool is_plain_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

// Tensors that a shard holds and the index does not list for it are left out.
TensorMap open_shards(const fs::path& folder) {
  TensorMap all;
  const auto owners = std::make_shared<std::vector<std::shared_ptr<const void>>>();
  for (const auto& [file, names] : open_shard_index((folder / kIndex).string())) {
    TensorMap shard = open_safetensors((folder / file).string());
    for (const std::string& name : names) {
      const auto tensor = shard.tensors.find(name);
      if (tensor == shard.tensors.end()) {
        fail(ErrorCode::invalid_checkpoint, folder / file,
             "has no tensor " + shown(name) + ", which " + kIndex + " says it holds");
      }
      all.tensors.insert(*tensor);
    }
    owners->push_back(std::move(shard.owner));
  }
  all.owner = owners;
  all.is_mapped = true;
  return all;
}

TensorMap open_weights(const fs::path& folder) {
  if (is_there(folder / kWeights)) return open_safetensors((folder / kWeights).string());
  if (is_there(folder / kIndex)) return open_shards(folder);
  std::string reason = std::string("has neither ") + kWeights + " nor " + kIndex;
  if (is_there(folder / kPickle)) {
    reason += std::string("; it has ") + kPickle + ", which only the Python package reads";
  }
  fail(ErrorCode::not_found, folder, reason);
}

}  // namespace

ModelConfig open_model_config(const std::string& folder) {
  std::error_code error;
  const fs::file_status status = fs::status(folder, error);
  if (error) fail(ErrorCode::not_found, folder, error.message());
  if (!fs::is_directory(status)) fail(ErrorCode::not_found, folder, "is not a folder");
  const fs::path path = fs::path(folder) / kConfig;
  const fs::path generation_path = fs::path(folder) / kGenerationConfig;
  ModelConfig config = read_model_config(read_json(path), source_of(path));
  // As in transformers, it replaces the ids of config.json even where it names none.
  if (is_there(generation_path)) {
    const json eos_token_id = read_json(generation_path).value("eos_token_id", json());
    config.eos_token_ids =
        read_eos_token_ids(eos_token_id, config.vocab_size, source_of(generation_path));
  }
  return config;
}

std::map<std::string, std::vector<std::string>> open_shard_index(const std::string& path) {
  const json index = read_json(path);
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object()) {
    fail(ErrorCode::invalid_checkpoint, path, "expected an object \"weight_map\"");
  }
  std::map<std::string, std::vector<std::string>> shards;
  for (const auto& [name, file] : weight_map->items()) {
    if (!file.is_string() || !is_plain_file_name(file.get<std::string>())) {
      fail(ErrorCode::invalid_checkpoint, path,
           "tensor " + shown(name) + ": expected the name of a file in the folder, got " +
               shown(file));
    }
    shards[file.get<std::string>()].push_back(name);
  }
  return shards;
}

DType stored_dtype(const Checkpoint& checkpoint) {
  std::map<DType, int64_t> counts;
  for (const auto& [name, tensor] : checkpoint.tensors.tensors)
    counts[tensor.dtype] += tensor.numel();
  const auto fewer = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto most = std::max_element(counts.begin(), counts.end(), fewer);
  return most == counts.end() ? DType::float32 : most->first;
}

Checkpoint open_checkpoint(const std::string& folder) {
  return {open_model_config(folder), open_weights(folder)};
}

}  // namespace ssmcore
