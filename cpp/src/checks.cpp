#include "checks.h"

#include <algorithm>
#include <vector>

#include "ssmcore/error.h"
#include "strided.h"

namespace ssmcore {
namespace {

std::string expected_shape(const Shape& shape) {
  std::string text = "(";
  for (int i = 0; i < shape.rank; ++i)
    text += (i > 0 ? ", " : "") + std::string(shape.dims[i].name) + " " +
            std::to_string(shape.dims[i].size);
  return text + ")";
}

// The bytes from the first to the last element.
struct Extent {
  const char* begin;
  const char* end;
};

Extent extent_of(const TensorView& tensor) {
  int64_t last = 0;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] == 0) return {nullptr, nullptr};
    last += (tensor.shape[i] - 1) * tensor.strides[i];
  }
  const char* begin = static_cast<const char*>(tensor.data);
  return {begin, begin + (last + 1) * static_cast<int64_t>(dtype_size(tensor.dtype))};
}

// Whether no two elements of the tensor share memory, as far as its strides show.
bool elements_are_distinct(const TensorView& tensor) {
  int dims[kMaxRank];  // by stride, the smallest first
  int count = 0;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] <= 1) continue;
    int place = count++;
    for (; place > 0 && tensor.strides[dims[place - 1]] > tensor.strides[i]; --place)
      dims[place] = dims[place - 1];
    dims[place] = i;
  }
  int64_t extent = 1;  // elements spanned by the dimensions before
  for (int k = 0; k < count; ++k) {
    const int i = dims[k];
    if (tensor.strides[i] < extent) return false;
    extent += (tensor.shape[i] - 1) * tensor.strides[i];
  }
  return true;
}

bool is_dense(const TensorView& tensor, const Extent& extent) {
  return extent.end - extent.begin ==
         tensor.numel() * static_cast<int64_t>(dtype_size(tensor.dtype));
}

}  // namespace

void Checks::fail(const std::string& message) const {
  throw Error(ErrorCode::invalid_argument, std::string(op_) + ": " + message);
}

void Checks::rank(const TensorView& tensor, const char* name, int rank, const char* dims) const {
  require(static_cast<bool>(tensor), [&] { return std::string(name) + " is missing"; });
  require(tensor.rank == rank, [&] {
    return std::string(name) + " has shape " + tensor.shape_string() + ", expected " +
           std::to_string(rank) + " dimensions " + dims;
  });
  for (int i = 0; i < rank; ++i)
    require(tensor.shape[i] > 0, [&] {
      return std::string(name) + " has shape " + tensor.shape_string() + ", every size of " + dims +
             " must be positive";
    });
}

void Checks::input(const TensorView& tensor, const char* name, const Shape& shape,
                   std::initializer_list<DType> dtypes) const {
  require(static_cast<bool>(tensor), [&] { return std::string(name) + " is missing"; });
  require(tensor.rank == shape.rank, [&] {
    return std::string(name) + " has shape " + tensor.shape_string() + ", expected " +
           expected_shape(shape);
  });
  for (int i = 0; i < shape.rank; ++i) {
    const Dim& dim = shape.dims[i];
    require(tensor.shape[i] == dim.size, [&] {
      return std::string(name) + " has " + dim.name + " " + std::to_string(tensor.shape[i]) +
             ", expected " + std::to_string(dim.size) + " (shape " + tensor.shape_string() +
             ", expected " + expected_shape(shape) + ")";
    });
    require(tensor.strides[i] >= 0, [&] {
      return std::string(name) + " has a negative stride in " + dim.name +
             "; strides must not be negative";
    });
  }
  require(std::find(dtypes.begin(), dtypes.end(), tensor.dtype) != dtypes.end(), [&] {
    std::string expected;
    for (DType dtype : dtypes)
      expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    return std::string(name) + " has dtype " + dtype_name(tensor.dtype) + ", expected " + expected;
  });
  require(tensor.device == device_, [&] {
    return std::string(name) + " is on " + to_string(tensor.device) + ", expected " +
           to_string(device_);
  });
  require(tensor.data != nullptr || tensor.numel() == 0,
          [&] { return std::string(name) + " has no memory"; });
  require(reinterpret_cast<uintptr_t>(tensor.data) % dtype_size(tensor.dtype) == 0, [&] {
    return std::string(name) + " is not aligned to its dtype, " + dtype_name(tensor.dtype);
  });
}

void Checks::optional(const TensorView& tensor, const char* name, const Shape& shape,
                      std::initializer_list<DType> dtypes) const {
  if (tensor) input(tensor, name, shape, dtypes);
}

void Checks::output(const TensorView& tensor, const char* name, const Shape& shape,
                    std::initializer_list<DType> dtypes) const {
  input(tensor, name, shape, dtypes);
  require(elements_are_distinct(tensor),
          [&] { return std::string(name) + " is written, but its strides make elements overlap"; });
}

void Checks::disjoint(const TensorView& output, const char* name, const TensorView& other,
                      const char* other_name) const {
  if (!output || !other) return;
  const Extent a = extent_of(output), b = extent_of(other);
  const bool may_meet = a.begin < b.end && b.begin < a.end;
  // Two views with gaps may interleave without meeting; a view without gaps cannot.
  const bool overlap =
      may_meet && (a.begin == b.begin || is_dense(output, a) || is_dense(other, b));
  require(!overlap, [&] { return std::string(name) + " is written, but overlaps " + other_name; });
}

void Checks::gradient(const Gradient& gradient, const char* name, const Shape& shape,
                      std::initializer_list<DType> dtypes) const {
  if (gradient.tensor) output(gradient.tensor, name, shape, dtypes);
}

void Checks::gradient_of(const TensorView& input, const Gradient& gradient, const char* name,
                         const Shape& shape, std::initializer_list<DType> dtypes) const {
  // Gradients are named as what they are of, after a d.
  require(input || !gradient.tensor,
          [&] { return std::string(name) + " is asked for, but " + (name + 1) + " is missing"; });
  this->gradient(gradient, name, shape, dtypes);
}

void Checks::disjoint_gradients(std::initializer_list<Named> gradients,
                                std::initializer_list<Named> inputs) const {
  for (const Named& gradient : gradients) {
    for (const Named& input : inputs)
      disjoint(gradient.tensor, gradient.name, input.tensor, input.name);
    for (const Named& other : gradients)
      if (&other != &gradient) disjoint(gradient.tensor, gradient.name, other.tensor, other.name);
  }
}

void Checks::same_or_disjoint(const TensorView& output, const char* name, const TensorView& other,
                              const char* other_name) const {
  const bool same = output.data == other.data && output.dtype == other.dtype &&
                    output.rank == other.rank &&
                    std::equal(output.shape, output.shape + output.rank, other.shape) &&
                    std::equal(output.strides, output.strides + output.rank, other.strides);
  if (!same) disjoint(output, name, other, other_name);
}

void Checks::state_indices(const TensorView& indices, int64_t batch, int64_t slots) const {
  if (!indices) return;
  input(indices, "state_indices", {{"batch", batch}}, {DType::int32});
  if (device_.type != DeviceType::cpu) return;
  std::vector<int32_t> used;
  used.reserve(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t slot = indices.as<const int32_t>()[b * indices.strides[0]];
    if (slot < 0) continue;
    require(slot < slots, [&] {
      return "state_indices[" + std::to_string(b) + "] is " + std::to_string(slot) +
             ", the state has " + std::to_string(slots) + " slots";
    });
    used.push_back(slot);
  }
  std::sort(used.begin(), used.end());
  const auto twice = std::adjacent_find(used.begin(), used.end());
  require(twice == used.end(), [&] {
    return "state_indices holds slot " + std::to_string(*twice) + " twice; slots must differ";
  });
}

int64_t Checks::cu_seqlens(const TensorView& cu_seqlens, int64_t batch, int64_t seqlen) const {
  rank(cu_seqlens, "cu_seqlens", 1, "(sequences + 1)");
  const int64_t sequences = cu_seqlens.shape[0] - 1;
  input(cu_seqlens, "cu_seqlens", {{"sequences + 1", sequences + 1}}, {DType::int32});
  require(sequences > 0, [] { return std::string("cu_seqlens has 1 entry, expected at least 2"); });
  require(batch == 1, [&] {
    return "cu_seqlens packs sequences into a batch of 1, got batch " + std::to_string(batch);
  });
  if (device_.type != DeviceType::cpu) return sequences;
  int64_t before = 0;
  for (int64_t s = 0; s <= sequences; ++s) {
    const int64_t at = cu_seqlens.as<const int32_t>()[s * cu_seqlens.strides[0]];
    const bool fits = s == 0           ? at == 0
                      : s == sequences ? at == seqlen && at >= before
                                       : at >= before;
    require(fits, [&] {
      return "cu_seqlens[" + std::to_string(s) + "] is " + std::to_string(at) +
             (s == 0        ? ", expected 0"
              : at < before ? ", less than the entry before, " + std::to_string(before)
                            : ", expected the sequence length, " + std::to_string(seqlen));
    });
    before = at;
  }
  return sequences;
}

void Checks::token_ids(const TensorView& ids, int64_t vocab_size) const {
  if (device_.type != DeviceType::cpu) return;
  if (ids.rank > 1) {
    for (int64_t i = 0; i < ids.shape[0]; ++i) token_ids(ids.select(0, i), vocab_size);
    return;
  }
  for (int64_t i = 0; i < ids.shape[0]; ++i) {
    const int64_t id = integer_at(ids.data, ids.dtype, i * ids.strides[0]);
    require(id >= 0 && id < vocab_size, [&] {
      return "token_ids holds " + std::to_string(id) + " at position " + std::to_string(i) +
             ", expected 0 to " + std::to_string(vocab_size - 1);
    });
  }
}

void Checks::divides(const char* name, const Dim& ngroups, const Dim& channels) const {
  require(ngroups.size > 0 && channels.size % ngroups.size == 0, [&] {
    return std::string(name) + " has ngroups " + std::to_string(ngroups.size) +
           ", which does not divide " + channels.name + " " + std::to_string(channels.size);
  });
}

void Checks::range(const char* name, int64_t value, int64_t least, int64_t most) const {
  require(value >= least && value <= most, [&] {
    return std::string(name) + " is " + std::to_string(value) + ", expected " +
           std::to_string(least) + " to " + std::to_string(most);
  });
}

void Checks::workspace(const Exec& exec, size_t needed) const {
  require(exec.workspace_bytes >= needed && (needed == 0 || exec.workspace), [&] {
    return "workspace has " + std::to_string(exec.workspace ? exec.workspace_bytes : 0) +
           " bytes, expected " + std::to_string(needed);
  });
}

}  // namespace ssmcore
