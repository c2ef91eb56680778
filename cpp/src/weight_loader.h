// From stored tensors to a model's weights.
#pragma once

#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "parameter_params.h"
#include "ssmcore/buffer.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/context.h"
#include "ssmcore/language_model.h"
#include "ssmcore/weight.h"

namespace ssmcore {

// `count` contiguous elements, float32, bfloat16 or float16, at any alignment.
void to_float32(const char* from, DType dtype, int64_t count, float* to);

// A copy whose tensors are float32 and lie in memory of their own on the context's device, where
// they may be written.
Checkpoint float32_copy(const Checkpoint& checkpoint, const Context& context);

// A copy in memory of the host of what lies on the context's device, contiguous.
Checkpoint host_copy(const Checkpoint& checkpoint, const Context& context);

// How transformers names what a checkpoint holds under `name`.
std::string transformers_name(const std::string& name);

// The gradient of a field, as WeightLoader knows it; empty where it is not wanted.
Gradient gradient_of(const NamedGradients& gradients, const std::string& field, int64_t layer);

// Takes tensors out of a checkpoint by the names of the model's fields, checks them, brings them to
// the context's device, one at a time, and converts those that are not used as stored. Fields of a
// layer are named within it ("mixer.D").
//
// Of a trainable model the tensors are a float32_copy(), and change: weights are used in place, or
// are copies that are made again when they have changed. On a GPU matrices are brought to the type
// of the activations, since products of two types are slow there.
class WeightLoader {
 public:
  static constexpr int64_t kNoLayer = -1;

  // `progress(done, total)`, if there is one, is called with bytes of the checkpoint. `copies`, for
  // a trainable model, takes the copies that are left to be made.
  WeightLoader(const TensorMap& stored, const Context& context, DType dtype,
               std::vector<Buffer>& buffers, std::vector<ParameterCopyParams>* copies,
               const LoadProgress& progress);

  // A matrix as stored; in the checkpoint's own memory where the device has it, aligned.
  TensorView matrix(const std::string& field, int64_t layer, int64_t rows, int64_t cols);
  // A small tensor, as contiguous float32.
  TensorView parameter(const std::string& field, int64_t layer,
                       std::initializer_list<int64_t> shape);
  // A small tensor of one row a channel, as a float32 (dim, n) whose channels lie side by side in
  // memory, as the kernels read them; `shape` holds dim · n elements, dim first.
  TensorView channels_last(const std::string& field, int64_t layer,
                           std::initializer_list<int64_t> shape,
                           ParameterMap map = ParameterMap::identity);

  // A field that the model does not use even if it is stored.
  void ignore(const std::string& field);
  // Throws for a stored tensor that nothing has taken. Waits until all are where they belong.
  void finish() const;

  // What has been taken, by its stored name.
  const std::map<std::string, TensorView>& taken() const { return taken_; }

 private:
  bool is_on_gpu() const { return context_.device().type == DeviceType::cuda; }
  // Memory of the device.
  TensorView allocate(DType dtype, std::initializer_list<int64_t> shape);
  // A float32 tensor of the device, written by fill(memory of the host).
  template <typename Fill>
  TensorView make(std::initializer_list<int64_t> shape, const Fill& fill);
  // A stored tensor has been brought over.
  void count(const TensorView& stored);
  // The stored tensor of a field, of this shape and a floating-point dtype.
  TensorView take(const std::string& field, int64_t layer, std::initializer_list<int64_t> shape);

  const TensorMap& stored_;
  const Context& context_;
  const DType dtype_;  // of the activations
  std::vector<Buffer>& buffers_;
  std::vector<ParameterCopyParams>* const copies_;
  const LoadProgress& progress_;
  size_t done_bytes_ = 0, total_bytes_ = 0;
  std::map<std::string, TensorView> taken_;
  std::set<std::string> ignored_;
};

}  // namespace ssmcore
