// Memory layout of the DLPack exchange structures (version 1, https://dmlc.github.io/dlpack).
#pragma once

#include <cstdint>

namespace ssmcore::dlpack {

enum DeviceCode : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5 };

struct Device {
  int32_t code;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};

// What a capsule named "dltensor" holds.
struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor* self);
};

// What a capsule named "dltensor_versioned" holds.
struct ManagedTensorVersioned {
  uint32_t major, minor;
  void* manager;
  void (*deleter)(ManagedTensorVersioned* self);
  uint64_t flags;
  Tensor tensor;
};

inline constexpr uint64_t kReadOnly = 1;

// What the capsule "dlpack_exchange_api" holds, the attribute __dlpack_c_exchange_api__ of a type
// of arrays: its exchange without calls of Python (version 1.3). Members that ssmcore does not use
// have no signature here.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void (*allocate)();
  void (*managed_tensor_from_object)();
  void (*managed_tensor_to_object)();
  // Borrows for as long as the object lives; -1 and a Python exception where it cannot.
  int (*tensor_from_object)(void* object, Tensor* tensor);
  int (*current_stream)(int32_t device_code, int32_t device_index, void** stream);
};

}  // namespace ssmcore::dlpack
