// Buffer: who allocates, who frees, and what an empty allocator says.
#include <doctest/doctest.h>

#include <cstdint>
#include <utility>

#include "check_error.h"
#include "ssmcore/buffer.h"
#include "ssmcore/context.h"

using namespace ssmcore;

namespace {

// Takes memory from the default allocator up to a limit, and keeps count.
class CountingAllocator final : public Allocator {
 public:
  explicit CountingAllocator(size_t limit = SIZE_MAX) : limit_(limit) {}
  Device device() const override { return {}; }
  void* allocate(size_t bytes, void* stream) override {
    if (live_bytes + bytes > limit_) return nullptr;
    live_bytes += bytes;
    ++allocations;
    last_stream = stream;
    return cpu_allocator().allocate(bytes, stream);
  }
  void deallocate(void* data, size_t bytes, void* stream) noexcept override {
    live_bytes -= bytes;
    last_stream = stream;
    cpu_allocator().deallocate(data, bytes, stream);
  }

  size_t live_bytes = 0;
  int allocations = 0;
  void* last_stream = nullptr;

 private:
  size_t limit_;
};

}  // namespace

TEST_CASE("Buffer: memory is aligned, whole and viewed from its start") {
  for (const size_t bytes : {size_t{1}, size_t{63}, size_t{64}, size_t{1000}, size_t{1} << 20}) {
    const Buffer buffer(cpu_allocator(), bytes, "a test");
    CHECK(buffer);
    CHECK(buffer.bytes() == bytes);
    CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % 64 == 0);
    static_cast<char*>(buffer.data())[bytes - 1] = 1;
  }
  const Buffer buffer(cpu_allocator(), 24, "a test");
  const TensorView view = buffer.view(DType::float32, {2, 3});
  CHECK(view.data == buffer.data());
  CHECK(view.shape_string() == "(2, 3)");
  CHECK(view.device == Device{});
}

TEST_CASE("Buffer: nothing is allocated for 0 bytes") {
  CountingAllocator allocator;
  const Buffer buffer(allocator, 0, "a test");
  CHECK_FALSE(buffer);
  CHECK(allocator.allocations == 0);
  CHECK_FALSE(Buffer());
}

TEST_CASE("Buffer: memory is freed once, on the stream that it came from") {
  CountingAllocator allocator;
  int stream = 0;
  {
    const Buffer buffer(allocator, 100, "a test", &stream);
    CHECK(allocator.live_bytes == 100);
    CHECK(allocator.last_stream == &stream);
    allocator.last_stream = nullptr;
  }
  CHECK(allocator.live_bytes == 0);
  CHECK(allocator.last_stream == &stream);
}

TEST_CASE("Buffer: moving passes the memory on") {
  CountingAllocator allocator;
  {
    Buffer first(allocator, 100, "a test");
    void* const data = first.data();
    Buffer second = std::move(first);
    CHECK(second.data() == data);
    CHECK(second.bytes() == 100);
    CHECK_FALSE(first);
    Buffer third(allocator, 50, "a test");
    third = std::move(second);
    CHECK(third.data() == data);
  }
  CHECK(allocator.live_bytes == 0);
  CHECK(allocator.allocations == 2);
}

TEST_CASE("Buffer: out of memory names the device, the size and the purpose") {
  CountingAllocator allocator(99);
  check_error(ErrorCode::out_of_memory, "out of memory on cpu: 100 bytes for the states of a test",
              [&] { Buffer(allocator, 100, "the states of a test"); });
  // The default allocator has an end too.
  check_error(ErrorCode::out_of_memory, std::to_string(SIZE_MAX),
              [] { Buffer(cpu_allocator(), SIZE_MAX, "everything"); });
}

TEST_CASE("Context: its allocator is the caller's, or the default") {
  CountingAllocator allocator;
  ContextOptions options;
  options.allocator = &allocator;
  CHECK(&Context({}, options).allocator() == &allocator);
  CHECK(&Context().allocator() == &cpu_allocator());
}
