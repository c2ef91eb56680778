#include "c_api_call.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace ssmcore::c_api {
namespace {

thread_local std::string last_error;

// The two lists of failures are one.
static_assert(SSMCORE_INVALID_ARGUMENT == static_cast<int>(ErrorCode::invalid_argument) + 1);
static_assert(SSMCORE_NOT_FINITE == static_cast<int>(ErrorCode::not_finite) + 1);

ssmcore_status record(ErrorCode code, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return static_cast<ssmcore_status>(static_cast<int>(code) + 1);
}

// DLPack's devices whose memory a CPU or a CUDA kernel may use.
enum { kCudaHost = 3, kCudaManaged = 13 };

struct KnownDType {
  DType dtype;
  ssmcore_dtype code;
};

constexpr KnownDType kDTypes[] = {
    {DType::float32, SSMCORE_FLOAT32},     {DType::float64, SSMCORE_FLOAT64},
    {DType::bfloat16, SSMCORE_BFLOAT16},   {DType::float16, SSMCORE_FLOAT16},
    {DType::int32, SSMCORE_INT32},         {DType::int64, SSMCORE_INT64},
    {DType::complex64, SSMCORE_COMPLEX64},
};

[[noreturn]] void fail(const std::string& what, const std::string& problem) {
  throw Error(ErrorCode::invalid_argument, what + " " + problem);
}

// Larger than any struct of the interface will be: whoever gives more has not set it.
constexpr size_t kLargestStruct = 4096;

}  // namespace

ssmcore_status record_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return record(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return record(ErrorCode::out_of_memory, "out of memory");
  } catch (const std::exception& error) {
    return record(ErrorCode::internal, error.what());
  } catch (...) {
    return record(ErrorCode::internal, "unknown exception");
  }
}

// Fields are added at the end and begin at a multiple of a pointer's size, so every version's size
// is one too.
void check_struct_size(const char* op, const char* name, size_t size, size_t known_size) {
  if (size < sizeof(size_t) || size > kLargestStruct || size % sizeof(void*) != 0)
    fail(std::string(op) + ": " + name, "has struct_size " + std::to_string(size) + ", expected " +
                                            std::to_string(known_size) +
                                            " (initialise it with SSMCORE_INIT)");
}

void read_struct(const char* op, const char* name, const void* given, size_t given_size,
                 void* known, size_t known_size) {
  check_struct_size(op, name, given_size, known_size);
  const auto* bytes = static_cast<const unsigned char*>(given);
  std::memcpy(known, bytes, std::min(given_size, known_size));
  for (size_t i = known_size; i < given_size; ++i)
    if (bytes[i] != 0)
      fail(std::string(op) + ": " + name,
           "has struct_size " + std::to_string(given_size) + " and sets fields beyond the " +
               std::to_string(known_size) + " bytes that this version of ssmcore knows");
}

DType to_dtype(const std::string& what, ssmcore_dtype dtype) {
  for (const KnownDType& known : kDTypes)
    if (std::memcmp(&known.code, &dtype, sizeof dtype) == 0) return known.dtype;
  fail(what, "has a dtype (code " + std::to_string(dtype.code) + ", " + std::to_string(dtype.bits) +
                 " bits, " + std::to_string(dtype.lanes) + " lanes) that ssmcore does not know");
}

ssmcore_dtype from_dtype(DType dtype) {
  return std::find_if(std::begin(kDTypes), std::end(kDTypes),
                      [&](const KnownDType& known) { return known.dtype == dtype; })
      ->code;
}

Device to_device(const std::string& what, ssmcore_device device) {
  switch (device.type) {
    case SSMCORE_DEVICE_CPU:
    case kCudaHost:
      return {};
    case SSMCORE_DEVICE_CUDA:
    case kCudaManaged:
      return {DeviceType::cuda, device.id};
  }
  fail(what,
       "is on a device (type " + std::to_string(device.type) + ") that ssmcore does not know");
}

TensorView TensorReader::operator()(const ssmcore_tensor* tensor, const char* name) const {
  TensorView view;
  if (!tensor) return view;
  const std::string what = std::string(op_) + ": " + name;
  if (tensor->ndim < 1 || tensor->ndim > kMaxRank)
    fail(what, "has " + std::to_string(tensor->ndim) + " dimensions, expected 1 to " +
                   std::to_string(kMaxRank));
  if (!tensor->shape) fail(what, "has no shape");
  view.dtype = to_dtype(what, tensor->dtype);
  view.device = to_device(what, tensor->device);
  view.rank = tensor->ndim;
  if (tensor->data) view.data = static_cast<char*>(tensor->data) + tensor->byte_offset;

  // Nothing that follows may overflow: the number of elements, and bytes from first to last.
  const auto item = static_cast<int64_t>(dtype_size(view.dtype));
  int64_t contiguous = 1, extent = item;
  for (int i = view.rank - 1; i >= 0; --i) {
    const int64_t size = view.shape[i] = tensor->shape[i];
    if (size < 0) fail(what, "has a negative size in dimension " + std::to_string(i));
    const int64_t stride = view.strides[i] = tensor->strides ? tensor->strides[i] : contiguous;
    int64_t step = 0;
    if (__builtin_mul_overflow(contiguous, size, &contiguous) ||
        __builtin_mul_overflow(contiguous, item, &step) ||
        __builtin_mul_overflow(stride, item, &step) ||
        __builtin_mul_overflow(step, std::max<int64_t>(size - 1, 0), &step) ||
        __builtin_add_overflow(extent, step, &extent))
      fail(what, "is larger than the address space");
  }
  return view;
}

}  // namespace ssmcore::c_api

const char* ssmcore_last_error(void) {
  return ssmcore::c_api::last_error.c_str();
}
