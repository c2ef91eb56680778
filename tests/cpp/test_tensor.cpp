// TensorView: shapes, strides and views into the same memory.
#include <doctest/doctest.h>

#include <numeric>
#include <vector>

#include "ssmcore/tensor.h"

using namespace ssmcore;

namespace {

std::vector<int64_t> shape_of(const TensorView& tensor) {
  return {tensor.shape, tensor.shape + tensor.rank};
}
std::vector<int64_t> strides_of(const TensorView& tensor) {
  return {tensor.strides, tensor.strides + tensor.rank};
}

using Sizes = std::vector<int64_t>;

}  // namespace

TEST_CASE("dtypes: sizes and names") {
  CHECK(dtype_size(DType::bfloat16) == 2);
  CHECK(dtype_size(DType::float16) == 2);
  CHECK(dtype_size(DType::float32) == 4);
  CHECK(dtype_size(DType::int32) == 4);
  CHECK(dtype_size(DType::float64) == 8);
  CHECK(dtype_size(DType::int64) == 8);
  CHECK(dtype_size(DType::complex64) == 8);
  CHECK(dtype_name(DType::bfloat16) == std::string("bfloat16"));
  CHECK(dtype_name(DType::complex64) == std::string("complex64"));
}

TEST_CASE("devices: comparison and text") {
  CHECK(Device{} == Device{DeviceType::cpu, 0});
  CHECK(Device{} != Device{DeviceType::cuda, 0});
  CHECK(Device{DeviceType::cuda, 0} != Device{DeviceType::cuda, 1});
  CHECK(to_string(Device{}) == "cpu");
  CHECK(to_string(Device{DeviceType::cuda, 1}) == "cuda:1");
}

TEST_CASE("TensorView: the empty view is absent") {
  const TensorView absent;
  CHECK_FALSE(absent);
  CHECK(absent.numel() == 0);
  CHECK(absent.shape_string() == "()");
}

TEST_CASE("TensorView: row-major strides, element count, text") {
  float memory[24];
  const TensorView tensor(memory, DType::float32, {2, 3, 4});
  CHECK(tensor);
  CHECK(strides_of(tensor) == Sizes{12, 4, 1});
  CHECK(tensor.numel() == 24);
  CHECK(tensor.is_contiguous());
  CHECK(tensor.shape_string() == "(2, 3, 4)");
  CHECK(tensor.as<float>() == memory);
  CHECK(TensorView(memory, DType::float32, {5}).shape_string() == "(5,)");
  CHECK(TensorView(memory, DType::float32, {2, 0, 4}).numel() == 0);
}

TEST_CASE("TensorView: contiguous means row-major without gaps") {
  float memory[24];
  const auto view = [&](std::initializer_list<int64_t> strides) {
    return TensorView(memory, DType::float32, {2, 3}, strides);
  };
  CHECK(view({3, 1}).is_contiguous());
  CHECK_FALSE(view({4, 1}).is_contiguous());
  CHECK_FALSE(view({1, 2}).is_contiguous());
  CHECK_FALSE(view({0, 1}).is_contiguous());
  // The stride of a dimension of size 1 means nothing.
  CHECK(TensorView(memory, DType::float32, {1, 3}, {99, 1}).is_contiguous());
}

TEST_CASE("TensorView: select, slice, transpose and unsqueeze are views of the same memory") {
  std::vector<int32_t> memory(24);
  std::iota(memory.begin(), memory.end(), 0);
  const TensorView tensor(memory.data(), DType::int32, {2, 3, 4});

  const TensorView selected = tensor.select(1, 2);
  CHECK(shape_of(selected) == Sizes{2, 4});
  CHECK(strides_of(selected) == Sizes{12, 1});
  CHECK(*selected.as<int32_t>() == 8);

  const TensorView sliced = tensor.slice(2, 1, 2);
  CHECK(shape_of(sliced) == Sizes{2, 3, 2});
  CHECK(strides_of(sliced) == Sizes{12, 4, 1});
  CHECK(*sliced.as<int32_t>() == 1);

  const TensorView transposed = tensor.transpose(0, 2);
  CHECK(shape_of(transposed) == Sizes{4, 3, 2});
  CHECK(strides_of(transposed) == Sizes{1, 4, 12});
  CHECK(transposed.data == tensor.data);

  for (int dim = 0; dim <= 3; ++dim) {
    const TensorView unsqueezed = tensor.unsqueeze(dim);
    CHECK(unsqueezed.rank == 4);
    CHECK(unsqueezed.shape[dim] == 1);
    CHECK(unsqueezed.is_contiguous());
    CHECK(shape_of(unsqueezed.select(dim, 0)) == Sizes{2, 3, 4});
  }
}
