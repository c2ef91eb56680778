// Tiles: kLanes channels by some steps of an operand, as floats, time-major. Whatever the layout
// and dtype of a tensor, kernels compute on tiles.
#pragma once

#include <cstring>
#include <type_traits>

#include "../strided.h"
#include "vec.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// One sequence of an operand: element (d, t) at data + d stride_d + t stride_t.
struct Plane {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride_d = 0, stride_t = 0;

  explicit operator bool() const { return data != nullptr; }
};

// The plane of the last two dimensions of an operand at the given indices of those before; empty
// where the operand is absent.
template <int Rank, typename... Index>
SSMCORE_INLINE Plane plane_of(const Strided<Rank>& tensor, DType dtype, Index... index) {
  static_assert(sizeof...(Index) == Rank - 2);
  Plane plane;
  if (!tensor) return plane;
  int64_t offset = 0;
  int dim = 0;
  ((offset += index * tensor.stride[dim++]), ...);
  plane.data = static_cast<char*>(tensor.data) + offset * static_cast<int64_t>(dtype_size(dtype));
  plane.dtype = dtype;
  plane.stride_d = tensor.stride[Rank - 2];
  plane.stride_t = tensor.stride[Rank - 1];
  return plane;
}

// The same where the last dimension is of channels alone: one column of lanes.
template <int Rank, typename... Index>
SSMCORE_INLINE Plane column_of(const Strided<Rank>& tensor, DType dtype, Index... index) {
  static_assert(sizeof...(Index) == Rank - 1);
  Strided<Rank + 1> with_time;
  with_time.data = tensor.data;
  for (int i = 0; i < Rank; ++i) with_time.stride[i] = tensor.stride[i];
  return plane_of(with_time, dtype, index...);
}

// A complex64 plane's real (part 0) or imaginary parts (part 1).
SSMCORE_INLINE Plane part_of(const Plane& complex, int part) {
  Plane plane = complex;
  if (!complex) return plane;
  plane.data = static_cast<float*>(complex.data) + part;
  plane.dtype = DType::float32;
  plane.stride_d *= 2;
  plane.stride_t *= 2;
  return plane;
}

namespace detail {

template <typename T>
SSMCORE_INLINE void load_tile(const T* from, int64_t stride_d, int64_t stride_t, int64_t channels,
                              int64_t steps, float* tile) {
  if (stride_d == 1 && channels == kLanes) {
    for (int64_t t = 0; t < steps; ++t) store(tile + t * kLanes, load(from + t * stride_t));
  } else if (stride_d == 1) {
    for (int64_t t = 0; t < steps; ++t)
      store(tile + t * kLanes, load_partial(from + t * stride_t, channels));
  } else {
    for (int64_t d = 0; d < kLanes; ++d) {
      if (d < channels) {
        const T* row = from + d * stride_d;
        int64_t t = 0;
        if (stride_t == 1) {
          for (; t + kLanes <= steps; t += kLanes) {
            float values[kLanes];
            store(values, load(row + t));
            for (int i = 0; i < kLanes; ++i) tile[(t + i) * kLanes + d] = values[i];
          }
        }
        for (; t < steps; ++t) tile[t * kLanes + d] = to_float(row[t * stride_t]);
      } else {
        for (int64_t t = 0; t < steps; ++t) tile[t * kLanes + d] = 0;
      }
    }
  }
}

template <typename T>
SSMCORE_INLINE void store_tile(const float* tile, int64_t channels, int64_t steps, T* to,
                               int64_t stride_d, int64_t stride_t) {
  if (stride_d == 1 && channels == kLanes) {
    for (int64_t t = 0; t < steps; ++t) store(to + t * stride_t, load(tile + t * kLanes));
  } else if (stride_d == 1) {
    for (int64_t t = 0; t < steps; ++t)
      store_partial(to + t * stride_t, load(tile + t * kLanes), channels);
  } else {
    for (int64_t d = 0; d < channels; ++d) {
      T* row = to + d * stride_d;
      int64_t t = 0;
      if (stride_t == 1) {
        for (; t + kLanes <= steps; t += kLanes) {
          float values[kLanes];
          for (int i = 0; i < kLanes; ++i) values[i] = tile[(t + i) * kLanes + d];
          store(row + t, load(values));
        }
      }
      for (; t < steps; ++t) from_float(tile[t * kLanes + d], row + t * stride_t);
    }
  }
}

}  // namespace detail

// Channels [d, d + channels) and steps [t, t + steps); lanes from `channels` on become 0.
inline void load_tile(const Plane& plane, int64_t d, int64_t channels, int64_t t, int64_t steps,
                      float* tile) {
  with_type(plane.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(plane.data) + d * plane.stride_d + t * plane.stride_t;
    detail::load_tile(from, plane.stride_d, plane.stride_t, channels, steps, tile);
  });
}

inline void store_tile(const float* tile, const Plane& plane, int64_t d, int64_t channels,
                       int64_t t, int64_t steps) {
  with_type(plane.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(plane.data) + d * plane.stride_d + t * plane.stride_t;
    detail::store_tile(tile, channels, steps, to, plane.stride_d, plane.stride_t);
  });
}

// Steps [0, steps) of a plane that may be absent: zeros then.
inline void load_tile_or_zeros(const Plane& plane, int64_t d, int64_t channels, int64_t steps,
                               float* tile) {
  if (plane)
    load_tile(plane, d, channels, 0, steps, tile);
  else
    std::memset(tile, 0, sizeof(float) * static_cast<size_t>(steps) * kLanes);
}

// Calls body(tile, d, channels) for the tiles of channels [begin, end), counting tiles from 0.
template <typename Body>
SSMCORE_INLINE void for_each_tile(int64_t begin, int64_t end, const Body& body) {
  for (int64_t d = begin, tile = 0; d < end; d += kLanes, ++tile)
    body(tile, d, min(kLanes, end - d));
}

// The rows of a call: sequences of a batch, or packed ones.
struct Rows {
  struct Row {
    int64_t batch, begin, end;  // steps [begin, end) of this row of the batch
    int64_t slot;               // of its state; negative: none
  };

  Strided<1> cu_seqlens, state_indices;
  int64_t seqlen;

  Row operator[](int64_t row) const {
    const int64_t slot =
        state_indices ? integer_at(state_indices.data, DType::int32, row * state_indices.stride[0])
                      : row;
    if (!cu_seqlens) return {row, 0, seqlen, slot};
    return {0, boundary(row), boundary(row + 1), slot};
  }
  // Where packed row `row` begins.
  int64_t boundary(int64_t row) const {
    return integer_at(cu_seqlens.data, DType::int32, row * cu_seqlens.stride[0]);
  }
};

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
