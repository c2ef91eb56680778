// Pieces of a (rows, steps) plane, rows being channels or states: eight elements a thread.
#pragma once

#include <cstdint>

#include "async_copy.cuh"
#include "types.cuh"

namespace ssmcore::cuda {

// Two fours of neighbouring steps. Where kAlongSteps they are eight steps of one row, for planes
// contiguous in time; otherwise four steps of two rows, for planes whose rows are neighbours.
// Elements stay as they lie in memory until they are used, so that loads need not be waited for.
template <typename T, bool kAlongSteps>
struct Piece {
  static constexpr int kWords = 2 * sizeof(T);
  static constexpr int kRows = kAlongSteps ? 1 : 2, kSteps = 8 / kRows;
  uint32_t word[kWords];

  // The row and the step of element `i` of a four, and its place in memory's order.
  __device__ static constexpr int row(int four) { return kAlongSteps ? 0 : four; }
  __device__ static constexpr int step(int four, int i) { return kAlongSteps ? 4 * four + i : i; }
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

// How kRows rows of a tile are cut into pieces: a thread's are `thread`, thread + kThreads, … .
// Eight neighbouring pieces have eight rows, whose fours lie in different banks.
template <typename Piece, int kRows, int kBlockL, int kThreads>
struct PieceCut {
  static constexpr int kAcross = kRows / Piece::kRows, kAlong = kBlockL / Piece::kSteps;
  static constexpr int kPieces = kAcross * kAlong, kOwn = (kPieces + kThreads - 1) / kThreads;
  static_assert(kPieces < kThreads || kPieces % kThreads == 0);

  __device__ static constexpr int row(int piece) {
    return Piece::kRows == 1 ? piece / (8 * kAlong) * 8 + piece % 8 : piece % kAcross * 2;
  }
  __device__ static constexpr int step(int piece) {
    return (Piece::kRows == 1 ? piece / 8 % kAlong : piece / kAcross) * Piece::kSteps;
  }
};

// Where in shared memory a thread keeps a piece until it uses it. Slots of kThreads neighbours are
// interleaved in 16 bytes.
template <typename Piece, int kThreads>
struct Slot {
  uint32_t* first;

  static constexpr int kWords = Piece::kWords * kThreads;  // of all threads
  __device__ __forceinline__ uint32_t* at(int word) const {
    return first + word / 4 * 4 * kThreads + word % 4;
  }
  // By way of the second-level cache alone.
  __device__ __forceinline__ Piece load() const {
    Piece piece;
#pragma unroll
    for (int i = 0; i < Piece::kWords; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(at(i));
      piece.word[i] = v.x;
      piece.word[i + 1] = v.y;
      piece.word[i + 2] = v.z;
      piece.word[i + 3] = v.w;
    }
    return piece;
  }
  __device__ __forceinline__ void store(const Piece& piece) const {
#pragma unroll
    for (int i = 0; i < Piece::kWords; i += 4)
      *reinterpret_cast<uint4*>(at(i)) =
          make_uint4(piece.word[i], piece.word[i + 1], piece.word[i + 2], piece.word[i + 3]);
  }
};

// A thread's view of a plane: at the first element of its first piece, and moved on in time.
template <typename T, bool kAlongSteps>
struct Cursor {
  using Element = std::remove_const_t<T>;
  using Piece = cuda::Piece<Element, kAlongSteps>;

  T* at;
  int64_t stride_row, stride_t;

  // Whether pieces may be moved as 16 bytes, or as pairs of rows, if they begin at multiples of
  // eight steps from here.
  __device__ bool is_aligned() const {
    const int64_t fast = kAlongSteps ? stride_t : stride_row;
    const int64_t slow = kAlongSteps ? stride_row : stride_t;
    const int64_t bytes = kAlongSteps ? 16 : 2 * sizeof(T);
    return fast == 1 && slow * static_cast<int64_t>(sizeof(T)) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(at) % bytes == 0;
  }

  __device__ __forceinline__ void advance(int steps) { at += steps * stride_t; }

  // Begins to copy the piece `rows` and `steps` from the first.
  template <int kThreads>
  __device__ __forceinline__ void copy(int rows, int steps, Slot<Piece, kThreads> slot) const {
    const T* from = at + rows * stride_row + steps * stride_t;
    if constexpr (kAlongSteps) {
#pragma unroll
      for (int i = 0; i < Piece::kWords; i += 4)
        copy_async<16>(slot.at(i), from + i * 4 / sizeof(T));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_async<2 * sizeof(T)>(slot.at(i * sizeof(T) / 2), from);
        from += stride_t;
      }
    }
  }

  // By way of the second-level cache alone.
  __device__ __forceinline__ Piece load() const {
    Piece piece;
    if constexpr (kAlongSteps) {
#pragma unroll
      for (int i = 0; i < Piece::kWords; i += 4) {
        const uint4 v = __ldcg(reinterpret_cast<const uint4*>(at) + i / 4);
        piece.word[i] = v.x;
        piece.word[i + 1] = v.y;
        piece.word[i + 2] = v.z;
        piece.word[i + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* from = at + i * stride_t;
        if constexpr (sizeof(T) == 4) {
          const uint2 v = __ldcg(reinterpret_cast<const uint2*>(from));
          piece.word[2 * i] = v.x;
          piece.word[2 * i + 1] = v.y;
        } else {
          piece.word[i] = __ldcg(reinterpret_cast<const unsigned*>(from));
        }
      }
    }
    return piece;
  }

  __device__ __forceinline__ void store(int rows, int steps, const Piece& piece) const {
    T* to = at + rows * stride_row + steps * stride_t;
    if constexpr (kAlongSteps) {
#pragma unroll
      for (int i = 0; i < Piece::kWords; i += 4)
        reinterpret_cast<uint4*>(to)[i / 4] =
            make_uint4(piece.word[i], piece.word[i + 1], piece.word[i + 2], piece.word[i + 3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<uint2*>(to) = make_uint2(piece.word[2 * i], piece.word[2 * i + 1]);
        else
          *reinterpret_cast<uint32_t*>(to) = piece.word[i];
        to += stride_t;
      }
    }
  }

  // The same one by one, of what lies within `rows_left` and `steps_left` of the piece's first; the
  // rest is 0. Not inlined: rare, and its registers would be missed elsewhere.
  __device__ __noinline__ static Piece load_some(Cursor cursor, int rows, int steps, int rows_left,
                                                 int steps_left) {
    const T* from = cursor.at + rows * cursor.stride_row + steps * cursor.stride_t;
    float value[8];
#pragma unroll
    for (int four = 0; four < 2; ++four)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = Piece::row(four), step = Piece::step(four, i);
        const bool exists = row < rows_left && step < steps_left;
        value[Piece::index(four, i)] =
            exists ? to_float(from[row * cursor.stride_row + step * cursor.stride_t]) : 0.0f;
      }
    Piece piece;
    piece.set(value);
    return piece;
  }

  __device__ __noinline__ static void store_some(Cursor cursor, int rows, int steps, int rows_left,
                                                 int steps_left, Piece piece) {
    T* to = cursor.at + rows * cursor.stride_row + steps * cursor.stride_t;
#pragma unroll
    for (int four = 0; four < 2; ++four)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = Piece::row(four), step = Piece::step(four, i);
        if (row < rows_left && step < steps_left)
          to[row * cursor.stride_row + step * cursor.stride_t] =
              from_float<Element>(piece.get(four, i));
      }
  }
};

}  // namespace ssmcore::cuda
