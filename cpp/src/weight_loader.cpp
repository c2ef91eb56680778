#include "weight_loader.h"

#include <cstring>

#include "mapped_file.h"
#include "memory.h"
#include "ssmcore/error.h"

namespace ssmcore {
namespace {

// The one table from a model's fields to stored names: transformers' first, then upstream's where
// it differs (transformers reads both). {} stands for the layer.
struct FieldName {
  const char* field;
  const char* stored[2];
};

constexpr FieldName kFieldNames[] = {
    {"embedding", {"backbone.embeddings.weight", "backbone.embedding.weight"}},
    {"norm_f", {"backbone.norm_f.weight"}},
    {"lm_head", {"lm_head.weight"}},
    {"norm", {"backbone.layers.{}.norm.weight"}},
    {"mixer.in_proj.weight", {"backbone.layers.{}.mixer.in_proj.weight"}},
    {"mixer.in_proj.bias", {"backbone.layers.{}.mixer.in_proj.bias"}},
    {"mixer.conv1d.weight", {"backbone.layers.{}.mixer.conv1d.weight"}},
    {"mixer.conv1d.bias", {"backbone.layers.{}.mixer.conv1d.bias"}},
    {"mixer.x_proj.weight", {"backbone.layers.{}.mixer.x_proj.weight"}},
    {"mixer.dt_proj.weight", {"backbone.layers.{}.mixer.dt_proj.weight"}},
    {"mixer.dt_proj.bias", {"backbone.layers.{}.mixer.dt_proj.bias"}},
    {"mixer.A_log", {"backbone.layers.{}.mixer.A_log"}},
    {"mixer.D", {"backbone.layers.{}.mixer.D"}},
    {"mixer.out_proj.weight", {"backbone.layers.{}.mixer.out_proj.weight"}},
    {"mixer.out_proj.bias", {"backbone.layers.{}.mixer.out_proj.bias"}},
};

std::string with_layer(std::string name, int64_t layer) {
  const size_t at = name.find("{}");
  return at == std::string::npos ? name : name.replace(at, 2, std::to_string(layer));
}

std::vector<std::string> stored_names(const std::string& field, int64_t layer) {
  std::vector<std::string> names;
  for (const FieldName& entry : kFieldNames)
    if (field == entry.field)
      for (const char* name : entry.stored)
        if (name) names.push_back(with_layer(name, layer));
  if (names.empty()) throw Error(ErrorCode::internal, "checkpoint: no stored name for " + field);
  return names;
}

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_checkpoint, "checkpoint: " + message);
}

float half_to_float(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t bits = magnitude | 0x7f800000u;  // infinity and NaN
  float value;
  if ((half & 0x7c00) != 0x7c00) {
    std::memcpy(&value, &magnitude, sizeof(value));
    value *= 0x1p112f;
    std::memcpy(&bits, &value, sizeof(bits));
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

void to_float32(const char* from, DType dtype, int64_t count, float* to) {
  if (dtype == DType::float32) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(count));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof(bits));
    if (dtype == DType::float16) {
      to[i] = half_to_float(bits);
    } else {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      std::memcpy(to + i, &wide, sizeof(wide));
    }
  }
}

std::string transformers_name(const std::string& name) {
  for (const FieldName& entry : kFieldNames)  // no name within a layer differs
    if (entry.stored[1] && name == entry.stored[1]) return entry.stored[0];
  return name;
}

Gradient gradient_of(const NamedGradients& gradients, const std::string& field, int64_t layer) {
  for (const std::string& name : stored_names(field, layer))
    if (const auto found = gradients.find(name); found != gradients.end()) return found->second;
  return {};
}

WeightLoader::WeightLoader(const TensorMap& stored, const Context& context, DType dtype,
                           std::vector<Buffer>& buffers, std::vector<ParameterCopyParams>* copies,
                           const LoadProgress& progress)
    : stored_(stored),
      context_(context),
      dtype_(dtype),
      buffers_(buffers),
      copies_(copies),
      progress_(progress) {
  for (const auto& [name, tensor] : stored.tensors) total_bytes_ += tensor.nbytes();
}

TensorView WeightLoader::take(const std::string& field, int64_t layer,
                              std::initializer_list<int64_t> shape) {
  const std::vector<std::string> names = stored_names(field, layer);
  for (const std::string& name : names) {
    const auto found = stored_.tensors.find(name);
    if (found == stored_.tensors.end()) continue;
    const TensorView& tensor = found->second;
    const TensorView expected(nullptr, tensor.dtype, shape);
    if (tensor.shape_string() != expected.shape_string())
      fail("tensor " + name + " has shape " + tensor.shape_string() + ", expected " +
           expected.shape_string());
    if (tensor.dtype != DType::float32 && tensor.dtype != DType::bfloat16 &&
        tensor.dtype != DType::float16)
      fail("tensor " + name + " has dtype " + dtype_name(tensor.dtype) +
           ", expected float32, bfloat16 or float16");
    const Device device = copies_ ? context_.device() : Device{};
    if (!(tensor.device == device))
      fail("tensor " + name + " is on " + to_string(tensor.device) + ", expected " +
           to_string(device));
    if (!tensor.is_contiguous()) fail("tensor " + name + " is not contiguous");
    taken_[name] = tensor;
    return tensor;
  }
  fail("tensor " + names.front() + " is missing");
}

TensorView WeightLoader::allocate(DType dtype, std::initializer_list<int64_t> shape) {
  buffers_.emplace_back(context_.allocator(), TensorView(nullptr, dtype, shape).nbytes(),
                        "a model's weights");
  return buffers_.back().view(dtype, shape);
}

template <typename Fill>
TensorView WeightLoader::make(std::initializer_list<int64_t> shape, const Fill& fill) {
  const TensorView made = allocate(DType::float32, shape);
  if (!is_on_gpu()) {
    fill(made.as<float>());
    return made;
  }
  std::vector<float> host(static_cast<size_t>(made.numel()));
  fill(host.data());
  copy_bytes(context_, made.data, host.data(), made.nbytes(), nullptr);
  return made;
}

void WeightLoader::count(const TensorView& stored) {
  // A checkpoint may be larger than the host's memory.
  if (stored_.is_mapped && is_on_gpu()) MappedFile::forget(stored.data, stored.nbytes());
  done_bytes_ += stored.nbytes();
  if (progress_) progress_(done_bytes_, total_bytes_);
}

TensorView WeightLoader::matrix(const std::string& field, int64_t layer, int64_t rows,
                                int64_t cols) {
  const TensorView stored = take(field, layer, {rows, cols});
  TensorView matrix = stored;
  if (copies_) {
    if (is_on_gpu() && dtype_ != DType::float32) {
      matrix = allocate(dtype_, {rows, cols});
      copies_->push_back(
          {rows, cols, ParameterMap::identity, Strided<2>(stored), dtype_, Strided<2>(matrix)});
    }
  } else if (is_on_gpu() ||
             reinterpret_cast<uintptr_t>(stored.data) % dtype_size(stored.dtype) != 0) {
    matrix = allocate(stored.dtype, {rows, cols});
    copy_bytes(context_, matrix.data, stored.data, stored.nbytes(), nullptr);
  }
  count(stored);
  return matrix;
}

TensorView WeightLoader::parameter(const std::string& field, int64_t layer,
                                   std::initializer_list<int64_t> shape) {
  const TensorView stored = take(field, layer, shape);
  if (copies_) {
    count(stored);
    return stored;
  }
  const TensorView converted = make(shape, [&](float* to) {
    to_float32(stored.as<const char>(), stored.dtype, stored.numel(), to);
  });
  count(stored);
  return converted;
}

TensorView WeightLoader::channels_last(const std::string& field, int64_t layer,
                                       std::initializer_list<int64_t> shape, ParameterMap map) {
  const TensorView stored = take(field, layer, shape);
  const int64_t dim = stored.shape[0], n = stored.numel() / dim;
  if (copies_) {
    const TensorView columns = allocate(DType::float32, {n, dim}).transpose(0, 1);
    const TensorView rows(stored.data, DType::float32, {dim, n}, stored.device);
    copies_->push_back({dim, n, map, Strided<2>(rows), DType::float32, Strided<2>(columns)});
    count(stored);
    return columns;
  }
  std::vector<float> rows(static_cast<size_t>(stored.numel()));
  to_float32(stored.as<const char>(), stored.dtype, stored.numel(), rows.data());
  for (float& value : rows) value = apply(map, value);
  const TensorView columns = make({n, dim}, [&](float* to) {
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t i = 0; i < n; ++i) to[i * dim + d] = rows[static_cast<size_t>(d * n + i)];
  });
  count(stored);
  return columns.transpose(0, 1);
}

void WeightLoader::ignore(const std::string& field) {
  for (const std::string& name : stored_names(field, kNoLayer)) ignored_.insert(name);
}

void WeightLoader::finish() const {
  for (const auto& [name, tensor] : stored_.tensors)
    if (!taken_.count(name) && !ignored_.count(name))
      fail("unexpected tensor " + name + " of shape " + tensor.shape_string());
  context_.synchronize();
}

}  // namespace ssmcore
