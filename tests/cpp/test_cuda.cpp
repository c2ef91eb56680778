// A GPU seen through the public headers: contexts, memory, streams, copies, one operator. Where
// there is none, what asks for one says so.
#include <doctest/doctest.h>

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "check_error.h"
#include "ssmcore/buffer.h"
#include "ssmcore/context.h"
#include "ssmcore/embedding.h"
#include "ssmcore/stream.h"

using namespace ssmcore;

namespace {

constexpr Device kGpu{DeviceType::cuda, 0};

// A copy of host values on the GPU.
template <typename T>
Buffer on_gpu(const Context& context, const std::vector<T>& values, DType dtype, void* stream) {
  const auto size = static_cast<int64_t>(values.size());
  Buffer buffer(context.allocator(), values.size() * sizeof(T), "test", stream);
  TensorView source(const_cast<T*>(values.data()), dtype, {size});
  copy(source, buffer.view(dtype, {size}), Exec{context, stream, nullptr, 0});
  return buffer;
}

}  // namespace

TEST_CASE("a device that is not there is refused, and the process goes on") {
#ifdef SSMCORE_WITH_CUDA
  const std::string reason = cuda_device_count() > 0 ? "this machine has" : "no usable GPU";
#else
  const std::string reason = "built without CUDA";
  CHECK(cuda_device_count() == 0);
#endif
  for (const int index : {-1, cuda_device_count(), 1 << 20})
    check_error(ErrorCode::unsupported, reason, [&] { Context(Device{DeviceType::cuda, index}); });
  CHECK(Context().device() == Device{});
}

TEST_CASE("on the CPU, streams and synchronisation are nothing") {
  const Context context;
  const Stream stream(context);
  CHECK(stream.handle() == nullptr);
  wait_for(context, nullptr, nullptr);
  context.synchronize();
  float from[3] = {1, 2, 3}, to[3] = {};
  copy(TensorView(from, DType::float32, {3}), TensorView(to, DType::float32, {3}), Exec{context});
  CHECK(to[2] == 3);
  check_error(ErrorCode::invalid_argument, "source is float32 (3,), target is float32 (2,)", [&] {
    copy(TensorView(from, DType::float32, {3}), TensorView(to, DType::float32, {2}), Exec{context});
  });
  check_error(ErrorCode::invalid_argument, "target is on cuda:0, expected cpu", [&] {
    copy(TensorView(from, DType::float32, {3}), TensorView(to, DType::float32, {3}, kGpu),
         Exec{context});
  });
}

TEST_CASE("an allocator of another device is refused") {
  struct Elsewhere final : Allocator {
    Device device() const override { return {DeviceType::cuda, 3}; }
    void* allocate(size_t, void*) override { return nullptr; }
    void deallocate(void*, size_t, void*) noexcept override {}
  } elsewhere;
  ContextOptions options;
  options.allocator = &elsewhere;
  check_error(ErrorCode::invalid_argument, "the allocator is of cuda:3, expected cpu",
              [&] { Context({}, options); });
}

TEST_CASE("on a GPU" * doctest::skip(cuda_device_count() == 0)) {
  const Context context(kGpu);
  const Stream stream(context);
  REQUIRE(stream.handle() != nullptr);
  const Exec exec{context, stream.handle(), nullptr, 0};

  SUBCASE("what is copied there and back is the same") {
    std::vector<int32_t> values(100'000), back(values.size());
    std::iota(values.begin(), values.end(), -7);
    const Buffer there = on_gpu(context, values, DType::int32, stream.handle());
    const auto size = static_cast<int64_t>(values.size());
    copy(there.view(DType::int32, {size}), TensorView(back.data(), DType::int32, {size}), exec);
    context.synchronize(stream.handle());
    CHECK(back == values);
  }

  SUBCASE("memory beyond the device's is refused with its size and purpose") {
    check_error(ErrorCode::out_of_memory, "1125899906842624 bytes for a test",
                [&] { Buffer(context.allocator(), size_t{1} << 50, "a test", stream.handle()); });
    CHECK(Buffer(context.allocator(), 1 << 20, "a test", stream.handle()).data() != nullptr);
  }

  SUBCASE("streams wait for one another") {
    const Stream other(context);
    std::vector<float> values(1 << 22), back(values.size());
    std::iota(values.begin(), values.end(), 0.0f);
    const auto size = static_cast<int64_t>(values.size());
    const Buffer a = on_gpu(context, values, DType::float32, stream.handle());
    const Buffer b(context.allocator(), a.bytes(), "test", stream.handle());
    copy(a.view(DType::float32, {size}), b.view(DType::float32, {size}), exec);
    wait_for(context, other.handle(), stream.handle());
    copy(b.view(DType::float32, {size}), TensorView(back.data(), DType::float32, {size}),
         Exec{context, other.handle(), nullptr, 0});
    context.synchronize(other.handle());
    CHECK(back == values);
  }

  SUBCASE("an id beyond the vocabulary is reported, not followed") {
    const Buffer weight =
        on_gpu(context, std::vector<float>{1, 2, 3, 4, 5, 6}, DType::float32, stream.handle());
    const Buffer ids =
        on_gpu(context, std::vector<int32_t>{2, 3, -1}, DType::int32, stream.handle());
    const Buffer out(context.allocator(), 6 * sizeof(float), "test", stream.handle());
    EmbeddingArgs args;
    args.token_ids = ids.view(DType::int32, {3});
    args.weight = weight.view(DType::float32, {3, 2});
    args.out = out.view(DType::float32, {3, 2});
    embedding(args, exec);
    check_error(ErrorCode::invalid_argument, "embedding: token_ids",
                [&] { context.synchronize(stream.handle()); });
    context.synchronize(stream.handle());  // reported once
    std::vector<float> rows(6, -1.0f);
    copy(args.out, TensorView(rows.data(), DType::float32, {3, 2}), exec);
    CHECK(rows == std::vector<float>{5, 6, 0, 0, 0, 0});
  }

  SUBCASE("arguments of the host are refused") {
    float memory[6] = {};
    int32_t ids[1] = {0};
    EmbeddingArgs args;
    args.token_ids = TensorView(ids, DType::int32, {1});
    args.weight = TensorView(memory, DType::float32, {3, 2});
    args.out = TensorView(memory, DType::float32, {1, 2});
    check_error(ErrorCode::invalid_argument, "token_ids is on cpu, expected cuda:0",
                [&] { embedding(args, exec); });
  }
}
