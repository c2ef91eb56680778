// The part of cuBLASLt's C interface that is used here. The library is found at run time, so that
// building needs neither it nor its headers; these declarations hold for its versions 12 and 13.
#pragma once

#include <cuda_runtime.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace ssmcore::cuda {

struct CublasLt {
  enum Status : int { kSuccess = 0 };
  enum ComputeType : int { kCompute32F = 68 };  // for float32 operands: no TF32
  enum Transpose : int32_t { kAsItIs = 0, kTransposed = 1 };
  enum Epilogue : int32_t { kAddBias = 4 };
  // How parts of a sum are added up. Both do so in a fixed order, in place in the type of the
  // output.
  enum ReductionScheme : uint32_t { kReductionInPlace = 1, kReductionInComputeType = 2 };
  enum class OperationAttribute : int {
    transpose_a = 3,
    transpose_b = 4,
    epilogue = 7,
    bias_pointer = 8,
    bias_data_type = 26,
  };
  enum class PreferenceAttribute : int {
    max_workspace_bytes = 1,
    reduction_scheme_mask = 3,
    min_alignment_a = 5,
    min_alignment_b = 6,
    min_alignment_c = 7,
    min_alignment_d = 8,
  };

  struct Algorithm {
    uint64_t data[8];
  };
  struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    Status status;
    float waves;
    int reserved[4];
  };

  // Opaque.
  using Handle = struct HandleStruct*;
  using Operation = struct OperationStruct*;
  using Layout = struct LayoutStruct*;
  using Preference = struct PreferenceStruct*;

  const char* (*status_name)(Status);
  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  Status (*operation_create)(Operation*, ComputeType, cudaDataType_t scale_type);
  Status (*operation_destroy)(Operation);
  Status (*operation_set)(Operation, OperationAttribute, const void* value, size_t bytes);
  Status (*layout_create)(Layout*, cudaDataType_t, uint64_t rows, uint64_t cols, int64_t ld);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void* value, size_t bytes);
  Status (*heuristic)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference,
                      int requested, Heuristic* results, int* count);
  Status (*check)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, const Algorithm*,
                  Heuristic* result);
  Status (*matmul)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b,
                   Layout, const void* beta, const void* c, Layout, void* d, Layout,
                   const Algorithm*, void* workspace, size_t workspace_bytes, cudaStream_t);
};

// Loaded on the first call, and for good: a copy that the process already has, else the file that
// SSMCORE_CUBLASLT names, else that of set_cublaslt_path(), else what the loader finds by name.
// Throws Error(unsupported) where there is none.
const CublasLt& cublaslt();

}  // namespace ssmcore::cuda
