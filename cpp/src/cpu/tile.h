// Tiles: kLanes channels by some steps of an operand, as floats, time-major. Whatever the layout
// and dtype of a tensor, kernels compute on tiles.
#pragma once

#include <type_traits>

#include "../strided.h"
#include "vec.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// One sequence of an operand: element (d, t) at data + d stride_d + t stride_t.
struct Plane {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride_d = 0, stride_t = 0;

  Plane() = default;
  // Row `index` of a (batch, dim, seqlen) operand; empty where that is absent.
  Plane(const Strided<3>& tensor, DType dtype, int64_t index)
      : data(tensor ? static_cast<char*>(tensor.data) +
                          index * tensor.stride[0] * static_cast<int64_t>(dtype_size(dtype))
                    : nullptr),
        dtype(dtype),
        stride_d(tensor.stride[1]),
        stride_t(tensor.stride[2]) {}

  explicit operator bool() const { return data != nullptr; }
};

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
        if (stride_t == 1)
          for (int64_t t = 0; t < steps; ++t) tile[t * kLanes + d] = to_float(row[t]);
        else
          for (int64_t t = 0; t < steps; ++t) tile[t * kLanes + d] = to_float(row[t * stride_t]);
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
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t t = 0; t < steps; ++t)
        from_float(tile[t * kLanes + d], to + d * stride_d + t * stride_t);
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

// The same for a (dim, n) parameter: a row of lanes for each of its n columns; and for a (dim) one,
// zeros where that is absent.
inline void load_parameter(const Strided<2>& parameter, DType dtype, int64_t d, int64_t channels,
                           int64_t n, float* tile) {
  Plane plane;
  plane.data = parameter.data;
  plane.dtype = dtype;
  plane.stride_d = parameter.stride[0];
  plane.stride_t = parameter.stride[1];
  load_tile(plane, d, channels, 0, n, tile);
}

inline void load_parameter(const Strided<1>& parameter, DType dtype, int64_t d, int64_t channels,
                           float* tile) {
  if (!parameter) return store(tile, Vec{});
  Strided<2> column;
  column.data = parameter.data;
  column.stride[0] = parameter.stride[0];
  load_parameter(column, dtype, d, channels, 1, tile);
}

// Calls body(tile, d, channels) for the tiles of channels [begin, end), counting tiles from 0.
template <typename Body>
SSMCORE_INLINE void for_each_tile(int64_t begin, int64_t end, const Body& body) {
  for (int64_t d = begin, tile = 0; d < end; d += kLanes, ++tile)
    body(tile, d, min(kLanes, end - d));
}

// The state slot of row b: the row itself without indices.
inline int64_t slot_of(const Strided<1>& state_indices, int64_t b) {
  if (!state_indices) return b;
  return static_cast<const int32_t*>(state_indices.data)[b * state_indices.stride[0]];
}

// One slot of a (slots, dim, n) state; empty for a negative slot and for an absent state.
inline Plane state_plane(const Strided<3>& states, DType dtype, int64_t slot) {
  return slot < 0 ? Plane() : Plane(states, dtype, slot);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
