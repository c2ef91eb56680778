// What every operator checks before it runs.
#pragma once

#include <initializer_list>
#include <string>

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// One expected dimension: its name in the vocabulary, and its size.
struct Dim {
  const char* name;
  int64_t size;
};

// An expected shape. Shapes are joined by +, as in Shape{batch} + channels + Shape{dstate}.
struct Shape {
  Dim dims[kMaxRank] = {};
  int rank = 0;

  Shape(std::initializer_list<Dim> list) {
    for (const Dim& dim : list) dims[rank++] = dim;
  }
  friend Shape operator+(Shape a, const Shape& b) {
    for (int i = 0; i < b.rank; ++i) a.dims[a.rank++] = b.dims[i];
    return a;
  }
};

// An argument and its name.
struct Named {
  const TensorView& tensor;
  const char* name;
};

// Checks the tensors of one call. Every failure throws Error(invalid_argument) that begins with
// the operator's name and names the argument.
class Checks {
 public:
  Checks(const char* op, Device device) : op_(op), device_(device) {}

  Device device() const { return device_; }

  // A required tensor of this rank, whose sizes are then read; none may be 0.
  void rank(const TensorView& tensor, const char* name, int rank, const char* dims) const;

  // A required tensor of exactly this shape and one of these dtypes, on the call's device.
  void input(const TensorView& tensor, const char* name, const Shape& shape,
             std::initializer_list<DType> dtypes) const;
  // The same, or absent.
  void optional(const TensorView& tensor, const char* name, const Shape& shape,
                std::initializer_list<DType> dtypes) const;
  // A required tensor that will be written: also refuses elements that share memory.
  void output(const TensorView& tensor, const char* name, const Shape& shape,
              std::initializer_list<DType> dtypes) const;
  // Refuses an output that is certain to overlap another argument.
  void disjoint(const TensorView& output, const char* name, const TensorView& other,
                const char* other_name) const;

  // A gradient, if it is wanted: an output.
  void gradient(const Gradient& gradient, const char* name, const Shape& shape,
                std::initializer_list<DType> dtypes) const;
  // The same, refused where what it would be the gradient of is absent.
  void gradient_of(const TensorView& input, const Gradient& gradient, const char* name,
                   const Shape& shape, std::initializer_list<DType> dtypes) const;
  // Refuses gradients that are certain to overlap an input or one another.
  void disjoint_gradients(std::initializer_list<Named> gradients,
                          std::initializer_list<Named> inputs) const;

  // Refuses an output that overlaps another argument, unless it is that very tensor, updated in
  // place.
  void same_or_disjoint(const TensorView& output, const char* name, const TensorView& other,
                        const char* other_name) const;

  // state_indices: (batch) int32; on the CPU also that each is below `slots` and none repeats.
  void state_indices(const TensorView& indices, int64_t batch, int64_t slots) const;

  // cu_seqlens: (sequences + 1) int32; on the CPU also that it ascends from 0 to `seqlen`. Returns
  // the number of sequences.
  int64_t cu_seqlens(const TensorView& cu_seqlens, int64_t batch, int64_t seqlen) const;

  // Token ids, int32 or int64: on the CPU, each in [0, vocab_size).
  void token_ids(const TensorView& ids, int64_t vocab_size) const;

  // B or C's number of groups divides that of channels or heads.
  void divides(const char* name, const Dim& ngroups, const Dim& channels) const;

  // A number in [least, most].
  void range(const char* name, int64_t value, int64_t least, int64_t most) const;

  void workspace(const Exec& exec, size_t needed) const;

  // Throws "op: message" unless `condition`.
  template <typename Message>  // a callable, so that the text is only built for a failure
  void require(bool condition, const Message& message) const {
    if (!condition) fail(message());
  }

  [[noreturn]] void fail(const std::string& message) const;

 private:
  const char* op_;
  Device device_;
};

// The dtypes an activation, and a weight, may have.
inline constexpr std::initializer_list<DType> kActivationTypes = {DType::float32, DType::bfloat16,
                                                                  DType::float16};

// The same and, on the CPU, float64 for checking.
inline std::initializer_list<DType> activation_or_double(Device device) {
  static constexpr std::initializer_list<DType> kWithDouble = {DType::float32, DType::bfloat16,
                                                               DType::float16, DType::float64};
  return device.type == DeviceType::cpu ? kWithDouble : kActivationTypes;
}
// Those of what goes with an activation: float64 where that is, else any activation type.
inline std::initializer_list<DType> any_beside(DType activation) {
  static constexpr std::initializer_list<DType> kDouble = {DType::float64};
  return activation == DType::float64 ? kDouble : kActivationTypes;
}
// Those of its statistics and losses: float64 where it is, else float32.
inline DType accumulator_of(DType activation) {
  return activation == DType::float64 ? DType::float64 : DType::float32;
}

// The dtypes of the scan, which is also computed in float64 for checking.
inline constexpr std::initializer_list<DType> kScanTypes = {DType::float32, DType::bfloat16,
                                                            DType::float16, DType::float64};

}  // namespace ssmcore
