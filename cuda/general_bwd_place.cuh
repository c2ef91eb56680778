// What a thread has of a tile of the general backward, and where its block keeps operands.
#pragma once

#include <type_traits>

#include "device/state_gradient.cuh"
#include "general_bwd_shape.h"

namespace ssmcore::cuda {

template <typename T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ __forceinline__ RealOf<T> to_real(T v) {
  if constexpr (std::is_same_v<T, double>)
    return v;
  else
    return to_float(v);
}

// Adds to a gradient's element, or overwrites it.
template <typename T>
__device__ __forceinline__ void put(T& to, RealOf<T> value, bool accumulate) {
  if (accumulate) value += to_real(to);
  if constexpr (std::is_same_v<T, double>)
    to = value;
  else
    to = from_float<T>(value);
}

// A thread's states of a tile, which lie in memory as numbers.
template <typename Real, bool kComplex>
struct StatesOfThread {
  using Quad = Vector<Real, GeneralBwdShape::kQuad>;
  using Value = std::conditional_t<kComplex, float2, Real>;
  static constexpr int kN = GeneralBwdShape::kQuad / (kComplex ? 2 : 1);

  Value value[kN];

  StatesOfThread() = default;
  __device__ explicit StatesOfThread(const Quad& quad) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if constexpr (kComplex)
        value[n] = {quad.value[2 * n], quad.value[2 * n + 1]};
      else
        value[n] = quad.value[n];
    }
  }
  __device__ Quad quad() const {
    Quad quad;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if constexpr (kComplex) {
        quad.value[2 * n] = value[n].x;
        quad.value[2 * n + 1] = value[n].y;
      } else {
        quad.value[n] = value[n];
      }
    }
    return quad;
  }
  __device__ Value& operator[](int n) { return value[n]; }
  __device__ const Value& operator[](int n) const { return value[n]; }
  __device__ void add(const StatesOfThread& other) {
#pragma unroll
    for (int n = 0; n < kN; ++n) value[n] = add_scaled(value[n], Real(1), other[n]);
  }
};

// What a thread has of a tile.
template <typename Real, bool kComplex>
struct TilePlace {
  using Quad = Vector<Real, GeneralBwdShape::kQuad>;
  static constexpr int kParts = kComplex ? 2 : 1, kN = GeneralBwdShape::kQuad / kParts;

  int64_t head, first_d, dstate;
  int channels;          // of the tile
  int channel, first_n;  // this thread's

  __device__ TilePlace(const SelectiveScanFwdParams& p, const GeneralBwdShape& s, int64_t head,
                       int64_t tile)
      : head(head), first_d(tile * s.tile_d), dstate(p.dstate) {
    channels = static_cast<int>(min(static_cast<int64_t>(s.tile_d), p.headdim - first_d));
    channel = static_cast<int>(threadIdx.x) / s.lanes;
    first_n = static_cast<int>(threadIdx.x) % s.lanes * kN;
  }

  // From a parameter or state whose element of channel d is at data + offset + d stride_d; zeros
  // where there is none.
  __device__ Quad load(const void* data, int64_t offset, int64_t stride_d, int64_t stride_n) const {
    const int64_t at = kParts * (offset + (first_d + channel) * stride_d);
    Quad quad{};
#pragma unroll
    for (int j = 0; j < GeneralBwdShape::kQuad; ++j)
      if (data != nullptr && is_there(j))
        quad.value[j] = static_cast<const Real*>(data)[at + number(j, stride_n)];
    return quad;
  }
  __device__ Quad load(const Strided<3>& from) const {
    return load(from.data, head * from.stride[0], from.stride[1], from.stride[2]);
  }
  __device__ Quad load(const Strided<4>& from, int64_t slot) const {
    return load(slot < 0 ? nullptr : from.data, slot * from.stride[0] + head * from.stride[1],
                from.stride[2], from.stride[3]);
  }

  __device__ void store(const StridedGradient<3>& to, const Quad& quad) const {
    store(to.data, head * to.stride[0], to.stride[1], to.stride[2], to.accumulate, quad);
  }
  __device__ void store(const StridedGradient<4>& to, int64_t slot, const Quad& quad) const {
    store(slot < 0 ? nullptr : to.data, slot * to.stride[0] + head * to.stride[1], to.stride[2],
          to.stride[3], to.accumulate, quad);
  }

 private:
  __device__ bool is_there(int j) const {
    return channel < channels && first_n + j / kParts < dstate;
  }
  __device__ int64_t number(int j, int64_t stride_n) const {
    return kParts * (first_n + j / kParts) * stride_n + j % kParts;
  }
  __device__ void store(void* data, int64_t offset, int64_t stride_d, int64_t stride_n,
                        bool accumulate, const Quad& quad) const {
    const int64_t at = kParts * (offset + (first_d + channel) * stride_d);
#pragma unroll
    for (int j = 0; j < GeneralBwdShape::kQuad; ++j)
      if (data != nullptr && is_there(j))
        put(static_cast<Real*>(data)[at + number(j, stride_n)], quad.value[j], accumulate);
  }
};

// Shared memory of a block, in numbers. Rows are of one step; they are padded against bank
// conflicts, and quads are aligned.
template <typename Real>
struct TileStaging {
  using Quad = Vector<Real, GeneralBwdShape::kQuad>;

  int stride_kept, stride_n, stride_d, stride_team;
  Real* kept;             // (block_l, kThreads, 4): the states after each step, then dh
  Real *B, *C;            // varying: (block_l, quads of all lanes); constant: (kThreads, 4)
  Quad* inputs;           // (block_l, tile_d): delta, delta u, dy and nothing
  Real *y, *dx, *ddelta;  // (block_l, teams): to be added up over the teams of a channel

  __host__ __device__ TileStaging(Real* memory, const GeneralBwdShape& s) {
    constexpr int kNumbers = GeneralBwdShape::kThreads * GeneralBwdShape::kQuad;
    const int width = s.lanes * GeneralBwdShape::kQuad;
    stride_kept = kNumbers + width % 32;
    stride_n = width + GeneralBwdShape::kQuad;
    stride_d = s.tile_d + 1;
    stride_team = s.teams() + 1;
    kept = memory;
    B = kept + s.block_l * stride_kept;
    const int varying = s.block_l * stride_n;
    C = B + (varying > kNumbers ? varying : kNumbers);
    Real* const end = C + (C - B);
    inputs = reinterpret_cast<Quad*>(end);
    y = end + s.block_l * stride_d * GeneralBwdShape::kQuad;
    dx = y + s.block_l * stride_team;
    ddelta = dx + s.block_l * stride_team;
  }
  static size_t bytes(const GeneralBwdShape& s) {
    Real* const nowhere = reinterpret_cast<Real*>(alignof(double));
    return sizeof(Real) * static_cast<size_t>(TileStaging(nowhere, s).ddelta +
                                              s.block_l * (s.teams() + 1) - nowhere);
  }
};

}  // namespace ssmcore::cuda
