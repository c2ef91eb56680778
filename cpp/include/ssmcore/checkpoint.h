// Reading model folders: config.json and safetensors, mapped and checked.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ssmcore/model_config.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// Stored tensors by name, and whatever keeps their memory alive. The memory may be read-only, and
// nothing aligns a tensor's data to its dtype. A stored scalar has shape (1).
struct TensorMap {
  std::map<std::string, TensorView> tensors;
  std::shared_ptr<const void> owner;
  bool is_mapped = false;  // all of it lies in mapped files
};

// One model folder as stored. Files are mapped, so a tensor costs memory only once it is touched.
struct Checkpoint {
  ModelConfig config;
  TensorMap tensors;
};

// The dtype that most of a checkpoint's numbers have.
DType stored_dtype(const Checkpoint& checkpoint);

// Opens a folder with config.json and model.safetensors, or shards named by
// model.safetensors.index.json. As in transformers, generation_config.json, if there, decides the
// end-of-sequence ids, even when it names none.
// Throws Error(not_found) for a path or file that is not there and Error(invalid_checkpoint) for
// one that is damaged; whatever the files hold, nothing is read outside them.
Checkpoint open_checkpoint(const std::string& folder);

// The config.json and generation_config.json of a folder, whatever it holds the tensors in. Throws
// as open_checkpoint does.
ModelConfig open_model_config(const std::string& folder);

// {"weight_map": {tensor name: file name}}, as in model.safetensors.index.json: the tensor names of
// each file. Throws as open_checkpoint does, also for a file name that leads out of the folder.
std::map<std::string, std::vector<std::string>> open_shard_index(const std::string& path);

// Writes config.json, generation_config.json and model.safetensors, as transformers reads them,
// into a folder that is made if need be. The tensors are written as stored, under transformers'
// names, without rows that only pad the vocabulary and without a head that is tied. Each file
// appears whole or not at all. Throws Error(invalid_argument) for a tensor that is not contiguous
// and Error(not_found) for a path that cannot be written.
void save_checkpoint(const Checkpoint& checkpoint, const std::string& folder);

// The tensors of one .safetensors file: F32, F64, BF16, F16, I32 or I64, of rank up to kMaxRank.
// Throws as open_checkpoint does.
TensorMap open_safetensors(const std::string& path);

}  // namespace ssmcore
