// Pieces of a (rows, steps) plane, rows being channels or states: eight elements a thread.
#pragma once

#include <cstdint>

#include "types.cuh"

namespace ssmcore::cuda {

// One sequence's part of an operand, from its first step on.
template <typename T>
struct Plane {
  T* data;
  int64_t stride_row, stride_t;
  bool vectors;  // pieces may be moved as 16 bytes or as pairs of rows
};

// Eight steps of one row where `along_steps`, for planes contiguous in time; otherwise four steps
// of two rows, for planes whose rows are neighbours.
template <typename T>
struct Piece {
  T value[8];

  __device__ static int row(bool along_steps, int i) { return along_steps ? 0 : i / 4; }
  __device__ static int step(bool along_steps, int i) { return along_steps ? i : i % 4; }
};

// `begins_aligned`: pieces begin at multiples of eight steps from the plane's first.
template <typename T>
__device__ inline bool vectors_fit(const Plane<T>& plane, bool along_steps, bool begins_aligned) {
  const int64_t fast = along_steps ? plane.stride_t : plane.stride_row;
  const int64_t slow = along_steps ? plane.stride_row : plane.stride_t;
  const int64_t bytes = along_steps ? 16 : 2 * sizeof(T);
  return fast == 1 && slow * static_cast<int64_t>(sizeof(T)) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(plane.data) % bytes == 0 && (begins_aligned || !along_steps);
}

// What lies beyond `rows` and `steps`, counted from (row, t), is 0.
template <typename T>
__device__ __forceinline__ void load_piece(const Plane<const T>& plane, bool along_steps,
                                           int64_t row, int64_t t, int64_t rows, int64_t steps,
                                           Piece<T>& piece) {
  const T* from = plane.data + row * plane.stride_row + t * plane.stride_t;
  if (along_steps) {
    if (plane.vectors && rows > 0 && steps >= 8) {
      constexpr int kSize = kVectorSize<T> < 8 ? kVectorSize<T> : 8;
#pragma unroll
      for (int i = 0; i < 8; i += kSize) {
        const auto vector = load_vector<kSize>(from + i);
#pragma unroll
        for (int j = 0; j < kSize; ++j) piece.value[i + j] = vector.value[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        piece.value[i] = rows > 0 && i < steps ? from[i * plane.stride_t] : from_float<T>(0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* at = from + i * plane.stride_t;
      if (plane.vectors && rows > 1 && i < steps) {
        const auto pair = load_vector<2>(at);
        piece.value[i] = pair.value[0];
        piece.value[4 + i] = pair.value[1];
      } else {
        piece.value[i] = rows > 0 && i < steps ? at[0] : from_float<T>(0);
        piece.value[4 + i] = rows > 1 && i < steps ? at[plane.stride_row] : from_float<T>(0);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_piece(const Plane<T>& plane, bool along_steps, int64_t row,
                                            int64_t t, int64_t rows, int64_t steps,
                                            const Piece<T>& piece) {
  T* to = plane.data + row * plane.stride_row + t * plane.stride_t;
  if (along_steps) {
    if (plane.vectors && rows > 0 && steps >= 8) {
      constexpr int kSize = kVectorSize<T> < 8 ? kVectorSize<T> : 8;
#pragma unroll
      for (int i = 0; i < 8; i += kSize) {
        Vector<T, kSize> vector;
#pragma unroll
        for (int j = 0; j < kSize; ++j) vector.value[j] = piece.value[i + j];
        store_vector(to + i, vector);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (rows > 0 && i < steps) to[i * plane.stride_t] = piece.value[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T* at = to + i * plane.stride_t;
      if (plane.vectors && rows > 1 && i < steps) {
        store_vector(at, Vector<T, 2>{piece.value[i], piece.value[4 + i]});
      } else {
        if (rows > 0 && i < steps) at[0] = piece.value[i];
        if (rows > 1 && i < steps) at[plane.stride_row] = piece.value[4 + i];
      }
    }
  }
}

}  // namespace ssmcore::cuda
