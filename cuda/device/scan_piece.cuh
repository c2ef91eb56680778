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
  bool vectors;  // pieces may be moved as 16 bytes, or as pairs of rows
};

__device__ __forceinline__ float low_half(uint32_t word, bfloat16) {
  return __uint_as_float(word << 16);
}
__device__ __forceinline__ float high_half(uint32_t word, bfloat16) {
  return __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ float low_half(uint32_t word, float16) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
}
__device__ __forceinline__ float high_half(uint32_t word, float16) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

// Two fours of neighbouring steps. Where kAlongSteps they are eight steps of one row, for planes
// contiguous in time; otherwise four steps of two rows, for planes whose rows are neighbours.
// Elements stay as they lie in memory until they are used, so that loads need not be waited for.
template <typename T, bool kAlongSteps>
struct Piece {
  static constexpr int kWords = 2 * sizeof(T);
  uint32_t word[kWords];

  // Which of the eight, in memory's order.
  __device__ static constexpr int index(int four, int i) {
    return kAlongSteps ? 4 * four + i : 2 * i + four;
  }

  __device__ __forceinline__ float get(int four, int i) const {
    const int at = index(four, i);
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word[at]);
    else
      return at % 2 == 0 ? low_half(word[at / 2], T()) : high_half(word[at / 2], T());
  }

  // From eight values in memory's order.
  __device__ __forceinline__ void set(const float (&value)[8]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(value[i]);
      } else {
        const Vector<T, 2> pair{from_float<T>(value[2 * i]), from_float<T>(value[2 * i + 1])};
        word[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
};

// `begins_aligned`: pieces begin at multiples of eight steps from the plane's first.
template <bool kAlongSteps, typename T>
__device__ inline bool vectors_fit(const Plane<T>& plane, bool begins_aligned) {
  const int64_t fast = kAlongSteps ? plane.stride_t : plane.stride_row;
  const int64_t slow = kAlongSteps ? plane.stride_row : plane.stride_t;
  const int64_t bytes = kAlongSteps ? 16 : 2 * sizeof(T);
  return fast == 1 && slow <= INT32_MAX && slow * static_cast<int64_t>(sizeof(T)) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(plane.data) % bytes == 0 && (begins_aligned || !kAlongSteps);
}

// What lies beyond `rows` and `steps`, counted from (row, t), is 0.
template <typename T, bool kAlongSteps>
__device__ __forceinline__ void load_piece(const Plane<const T>& plane, int row, int64_t t,
                                           int rows, int steps, Piece<T, kAlongSteps>& piece) {
  const T* from = plane.data + row * plane.stride_row + t * plane.stride_t;
  if (plane.vectors && rows > (kAlongSteps ? 0 : 1) && steps >= (kAlongSteps ? 8 : 4)) {
    if constexpr (kAlongSteps) {
#pragma unroll
      for (int i = 0; i < piece.kWords; i += 4) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
        piece.word[i] = v.x;
        piece.word[i + 1] = v.y;
        piece.word[i + 2] = v.z;
        piece.word[i + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* pair = from + i * static_cast<uint32_t>(plane.stride_t);
        if constexpr (sizeof(T) == 4) {
          const uint2 v = __ldg(reinterpret_cast<const uint2*>(pair));
          piece.word[2 * i] = v.x;
          piece.word[2 * i + 1] = v.y;
        } else {
          piece.word[i] = __ldg(reinterpret_cast<const uint32_t*>(pair));
        }
      }
    }
  } else {
    float value[8];
#pragma unroll
    for (int four = 0; four < 2; ++four)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = kAlongSteps ? 0 : four, step = kAlongSteps ? 4 * four + i : i;
        value[piece.index(four, i)] =
            r < rows && step < steps ? to_float(from[r * plane.stride_row + step * plane.stride_t])
                                     : 0.0f;
      }
    piece.set(value);
  }
}

template <typename T, bool kAlongSteps>
__device__ __forceinline__ void store_piece(const Plane<T>& plane, int row, int64_t t, int rows,
                                            int steps, const Piece<T, kAlongSteps>& piece) {
  T* to = plane.data + row * plane.stride_row + t * plane.stride_t;
  if (plane.vectors && rows > (kAlongSteps ? 0 : 1) && steps >= (kAlongSteps ? 8 : 4)) {
    if constexpr (kAlongSteps) {
#pragma unroll
      for (int i = 0; i < piece.kWords; i += 4)
        reinterpret_cast<uint4*>(to)[i / 4] =
            make_uint4(piece.word[i], piece.word[i + 1], piece.word[i + 2], piece.word[i + 3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T* pair = to + i * static_cast<uint32_t>(plane.stride_t);
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<uint2*>(pair) = make_uint2(piece.word[2 * i], piece.word[2 * i + 1]);
        else
          *reinterpret_cast<uint32_t*>(pair) = piece.word[i];
      }
    }
  } else {
#pragma unroll
    for (int four = 0; four < 2; ++four)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = kAlongSteps ? 0 : four, step = kAlongSteps ? 4 * four + i : i;
        if (r < rows && step < steps)
          to[r * plane.stride_row + step * plane.stride_t] = from_float<T>(piece.get(four, i));
      }
  }
}

}  // namespace ssmcore::cuda
