// A whole language model: embedding, pre-norm residual blocks, final norm, head.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ssmcore/buffer.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/model_config.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

class Mixer;
struct ParameterCopyParams;
struct StateSpec;

// The memory of running sequences: for every layer, the tensors its mixer carries from one token to
// the next, with one slot a sequence. Belongs to the model that made it, and lies on its device;
// on a GPU each call is in the order of `stream`.
class ModelState {
 public:
  int64_t num_slots() const { return num_slots_; }
  const Context& context() const { return *context_; }
  size_t nbytes() const;
  // A copy of every slot.
  ModelState clone(void* stream = nullptr) const;
  // All slots as bytes and back, for a file; `load` throws Error(invalid_argument) unless they were
  // written from a state of the same model shape and number of slots.
  std::string save(void* stream = nullptr) const;
  void load(const std::string& bytes, void* stream = nullptr);
  // What follows throws Error(invalid_argument) for a slot out of range.
  // Whether nothing has been read: a sequence starts from zeros.
  bool is_at_start(int64_t slot, void* stream = nullptr) const;
  // Back to the start of a sequence.
  void reset_slot(int64_t slot, void* stream = nullptr);
  void copy_slot(int64_t from, int64_t to, void* stream = nullptr);

 private:
  friend class LanguageModel;
  ModelState() = default;
  ModelState(const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots,
             const Context& context, uint64_t model, void* stream);
  void check_slot(const char* name, int64_t slot) const;
  char* slot_data(int64_t slot) const;
  std::string header() const;

  // tensors[layer][i], each with num_slots rows along its first dimension. All of a slot is one
  // piece of memory.
  std::vector<std::vector<TensorView>> tensors_;
  Buffer buffer_;
  int64_t num_slots_ = 0;
  size_t slot_bytes_ = 0;
  const Context* context_ = nullptr;
  uint64_t model_ = 0;  // serial number
};

struct LanguageModelFwdArgs {
  // (batch, seqlen), int32 or int64, seqlen ≥ 1. For a model on a GPU in memory of either the host,
  // where ids are checked at once, or the GPU.
  TensorView token_ids;
  // Packed sequences of unequal lengths: batch is 1, and each sequence is a row for the state. In
  // memory of the host, wherever the model is, and state_indices with it.
  TensorView cu_seqlens;        // optional (rows + 1), int32, as in SelectiveScanFwdArgs
  ModelState* state = nullptr;  // read, then updated
  TensorView state_indices;     // optional (batch), int32: each row's slot, all different; absent:
                                // row b uses slot b, and the state has as many slots as rows
  TensorView logits;  // float32, written: (batch, seqlen, vocab_size); or (rows, vocab_size) for
                      // the last position of each row alone, none of them empty; or absent
};

// Gradients by the names of LanguageModel::parameters(), each a contiguous float32 tensor of its
// parameter's shape. What is left out is not computed.
using NamedGradients = std::map<std::string, Gradient>;

struct LanguageModelTrainArgs {
  // token_ids and targets are in memory of the host, where they are checked at once, or of the
  // model's device, there contiguous; cu_seqlens is in that of the host. Of a step on a GPU, pinned
  // memory of the host may change once the step is done, other memory once the call returns.
  TensorView token_ids;   // (batch, seqlen), int32 or int64: sequences from their start
  TensorView targets;     // (batch, seqlen), int32 or int64: the token that each position should
                          // predict, or kIgnoredTarget
  TensorView cu_seqlens;  // optional (sequences + 1), int32: packed, as in LanguageModelFwdArgs
  // What the sum of the positions' losses is divided by. 0: the number of targets that are not
  // ignored; where a batch is done in parts that accumulate, their number in all parts.
  int64_t num_targets = 0;
  // Activation checkpointing: keeps only what enters each layer, and computes the layer again when
  // its gradients are due.
  bool recompute_layers = false;
  TensorView loss;           // (1), float32, on the model's device, written
  NamedGradients gradients;  // written, or added to
};

inline constexpr int64_t kIgnoredTarget = -100;

// Called with the bytes of the checkpoint that have been taken, and all there are.
using LoadProgress = std::function<void(size_t done, size_t total)>;

struct LoadOptions {
  // Of the activations: float32, bfloat16 or float16. By default float32 on the CPU, and the type
  // most weights are stored in on a GPU. Weights stay as stored,
  std::optional<DType> dtype;
  // or are copied as float32 to memory of the model's own, where parameters() may be written. On a
  // GPU matrices are then used in the type of the activations. (Gradients of float16 activations
  // underflow where there are many targets; bfloat16 is for training.)
  bool trainable = false;
  LoadProgress progress = nullptr;  // optional
};

// Not changed by use, so threads may share it, each with its own state and workspace. The context
// must outlive it, and its device holds the weights.
class LanguageModel {
 public:
  // Throws Error(invalid_checkpoint) for a missing or wrongly shaped tensor, and
  // Error(out_of_memory); what was allocated is then free again.
  LanguageModel(const Checkpoint& checkpoint, const Context& context,
                const LoadOptions& options = {});
  ~LanguageModel();
  LanguageModel(LanguageModel&&) noexcept;

  const ModelConfig& config() const { return checkpoint_.config; }
  const Context& context() const { return *context_; }
  DType dtype() const { return dtype_; }
  int64_t num_parameters() const;

  // What it was made from: the configuration and the tensors as stored, or where it is trainable as
  // they are now, on the model's device.
  const Checkpoint& checkpoint() const { return checkpoint_; }
  // save_checkpoint() of it, wherever it is.
  void save(const std::string& folder) const;

  // The tensors of the checkpoint that it has learnt, by their stored names; a head that is tied to
  // the embedding is none of them. Those of a trainable model are float32 on the model's device,
  // and may be written while no call runs; it follows with the next refresh(), on a GPU in the
  // order of `stream`.
  const std::map<std::string, TensorView>& parameters() const { return parameters_; }
  bool trainable() const { return trainable_; }
  void refresh(void* stream = nullptr);

  // On a GPU in the order of `stream`.
  ModelState new_state(int64_t num_slots, void* stream = nullptr) const;

  // Sequences are processed in chunks, so that this stays bounded however long they are.
  size_t workspace_size(int64_t batch, int64_t seqlen, const Context& context) const;
  void forward(const LanguageModelFwdArgs& args, const Exec& exec) const;

  // One training step: the mean cross entropy and its gradients. The logits of few positions exist
  // at a time. On a GPU in the order of exec.stream; with token_ids or targets of the host, or with
  // cu_seqlens, not while that is captured in a CUDA graph.
  size_t loss_and_gradients_workspace_size(const LanguageModelTrainArgs& args,
                                           const Context& context) const;
  void loss_and_gradients(const LanguageModelTrainArgs& args, const Exec& exec) const;

 private:
  struct Layer;
  struct Activations;
  class TrainingStep;

  // Everything below that comes from the checkpoint's tensors.
  void load(const LoadProgress& progress);
  size_t chunk_workspace_size(int64_t batch, int64_t length, const Context& context) const;
  // Tokens [begin, begin + length) of every row.
  void forward_chunk(const LanguageModelFwdArgs& args, int64_t begin, int64_t length,
                     const Exec& exec) const;
  // The same of packed sequences, of which `row` is the first that has not ended before. Returns
  // the first that does not end within.
  int64_t forward_packed_chunk(const LanguageModelFwdArgs& args, int64_t row, int64_t begin,
                               int64_t length, const Exec& exec) const;
  // From the embedding to the last mixer: the result is at.residual, with what is returned, if
  // anything, yet to be added to it.
  TensorView forward_layers(const TensorView& token_ids, const ModelState& state,
                            const TensorView& state_indices, const TensorView& cu_seqlens,
                            const Activations& at, const Exec& exec) const;
  // The same of one token a row, where the mixers have a kernel for whole layers: all is in
  // at.residual then. Returns whether they have.
  bool step_layers(const ModelState& state, const TensorView& state_indices, const Activations& at,
                   const Exec& exec) const;
  void final_norm(const TensorView& hidden, const TensorView& residual, const TensorView& normed,
                  const Exec& exec) const;
  // The head at every position: logits is (batch, length, vocab_size).
  void all_logits(const TensorView& logits, const TensorView& hidden, const Activations& at,
                  const Exec& exec) const;

  Checkpoint checkpoint_;  // dense weights point into its memory
  DType dtype_ = DType::float32;
  bool trainable_ = false;
  uint64_t serial_;
  const Context* context_ = nullptr;
  std::map<std::string, TensorView> parameters_;
  std::vector<Buffer> buffers_;              // weights that are not used as and where stored
  std::vector<ParameterCopyParams> copies_;  // what refresh() does
  std::vector<Layer> layers_;
  TensorView embedding_;
  TensorView head_;
  TensorView norm_f_;
};

}  // namespace ssmcore
