// The selective scan in full generality: real or complex A, constant or varying B and C, any
// option. A block takes some channels of one row, several lanes a channel, and steps through time
// with the states in registers. Operands are staged in shared memory, some steps at a time.
#include <type_traits>

#include "device/state.cuh"
#include "launch.h"
#include "scan_row.cuh"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxBlockL = 32;

// How blocks and lanes are laid out. All but `tiles` are powers of two.
struct Shape {
  int lanes;      // of a channel
  int block_d;    // channels of a block
  int block_l;    // steps staged at a time
  int64_t tiles;  // blocks that make one head
  bool few;       // 2 states a thread instead of 8
};

template <typename T>
__device__ const T* const_data(const void* data) {
  return static_cast<const T*>(data);
}

// Shared memory, in floats. Rows of delta and delta_u are of one step, padded against bank
// conflicts; rows of B and C keep 16-byte alignment.
struct Staging {
  int stride_d, stride_n;
  float *B, *C;            // (block_l, states of all lanes, parts)
  float *delta, *delta_u;  // (block_l, block_d); y replaces delta_u

  __host__ __device__ Staging(float* memory, const Shape& shape, int states, int parts)
      : stride_d(shape.block_d + 1), stride_n(states * parts + 4) {
    B = memory;
    C = B + shape.block_l * stride_n;
    delta = C + shape.block_l * stride_n;
    delta_u = delta + shape.block_l * stride_d;
  }
  __host__ __device__ static size_t bytes(const Shape& shape, int states, int parts) {
    return sizeof(float) * 2 * static_cast<size_t>(shape.block_l) *
           (states * parts + 4 + shape.block_d + 1);
  }
};

// A tensor's part that a block works on: element (i, t) at data + i stride_i + t stride_t.
template <typename T>
struct Plane {
  T* data = nullptr;
  int64_t stride_i = 0, stride_t = 0;

  __device__ T& at(int64_t i, int64_t t) const { return data[i * stride_i + t * stride_t]; }
};

template <typename T>
__device__ Plane<T> plane_of(const Strided<4>& tensor, int64_t i, int64_t j) {
  if (tensor.data == nullptr) return {};
  return {static_cast<T*>(tensor.data) + i * tensor.stride[0] + j * tensor.stride[1],
          tensor.stride[2], tensor.stride[3]};
}

// Calls body(i, t) for all i < width and t < steps, neighbouring threads on neighbouring memory.
// `width` and `block_l` are powers of two.
template <typename Body>
__device__ void for_each_element(int width, int block_l, int steps, bool along_t,
                                 const Body& body) {
  const int inner = along_t ? block_l : width, shift = __ffs(inner) - 1;
  for (int e = threadIdx.x; e < width * block_l; e += kThreads) {
    const int low = e & (inner - 1), high = e >> shift;
    const int i = along_t ? high : low, t = along_t ? low : high;
    if (t < steps) body(i, t);
  }
}

// One block's scan over one row of kThreads / lanes channels, kN states a thread.
template <typename T, bool kComplex, int kN>
class Scan {
  using Value = State<kComplex>;
  static constexpr int kParts = kComplex ? 2 : 1;

 public:
  __device__ Scan(const SelectiveScanFwdParams& p, const Shape& shape, const Staging& s,
                  const ScanRow& row, int64_t row_index, int64_t head, int64_t first_d)
      : p(p), shape(shape), s(s), row(row), row_index(row_index), head(head), first_d(first_d) {
    channel = static_cast<int>(threadIdx.x) / shape.lanes;
    first_n = static_cast<int>(threadIdx.x) % shape.lanes * kN;
    channels = static_cast<int>(min(static_cast<int64_t>(shape.block_d), p.headdim - first_d));
  }

  __device__ void run(int64_t chunk) {
    load_states(p.A.data, p.A.stride[0] * head, p.A.stride[1], p.A.stride[2], A);
    for (int n = 0; n < kN; ++n) A[n] = scaled_rate(A[n]);
    load_states(p.constant_B.data, p.constant_B.stride[0] * head, p.constant_B.stride[1],
                p.constant_B.stride[2], B);
    load_states(p.constant_C.data, p.constant_C.stride[0] * head, p.constant_C.stride[1],
                p.constant_C.stride[2], C);
    const Strided<4>& initial = p.initial_state;
    load_states(row.slot < 0 ? nullptr : initial.data,
                initial.stride[0] * row.slot + initial.stride[1] * head, initial.stride[2],
                initial.stride[3], h);
    int64_t to_chunk_end = p.chunk_size;
    for (int64_t t = row.begin; t < row.end;) {
      int64_t steps = min(static_cast<int64_t>(shape.block_l), row.end - t);
      if (p.chunk_states.data != nullptr) steps = min(steps, to_chunk_end);
      stage(t, static_cast<int>(steps));
      __syncthreads();
      advance_states(static_cast<int>(steps));
      __syncthreads();
      finish(t, static_cast<int>(steps));
      __syncthreads();
      t += steps;
      to_chunk_end -= steps;
      if (p.chunk_states.data != nullptr && (to_chunk_end == 0 || t == row.end)) {
        const Strided<5>& to = p.chunk_states;
        if (chunk < p.chunks)
          store_states(to.data,
                       to.stride[0] * row.batch + to.stride[1] * chunk + to.stride[2] * head,
                       to.stride[3], to.stride[4]);
        ++chunk;
        to_chunk_end = p.chunk_size;
      }
    }
    if (p.last_state.data != nullptr && row.slot >= 0)
      store_states(p.last_state.data,
                   p.last_state.stride[0] * row.slot + p.last_state.stride[1] * head,
                   p.last_state.stride[2], p.last_state.stride[3]);
    if (p.delta_sum.data != nullptr && first_n == 0 && channel < channels)
      static_cast<float*>(
          p.delta_sum.data)[p.delta_sum.stride[0] * row_index + p.delta_sum.stride[1] * head +
                            p.delta_sum.stride[2] * (first_d + channel)] = delta_sum;
  }

 private:
  // This thread's states of a parameter or state; zeros where there are none.
  __device__ void load_states(const void* data, int64_t offset, int64_t stride_d, int64_t stride_n,
                              Value (&to)[kN]) const {
    const float* from =
        static_cast<const float*>(data) + kParts * (offset + (first_d + channel) * stride_d);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const bool there = data != nullptr && channel < channels && first_n + n < p.dstate;
      const int64_t at = kParts * (first_n + n) * stride_n;
      if constexpr (kComplex)
        to[n] = there ? float2{from[at], from[at + 1]} : float2{0, 0};
      else
        to[n] = there ? from[at] : 0.0f;
    }
  }

  __device__ void store_states(void* data, int64_t offset, int64_t stride_d,
                               int64_t stride_n) const {
    float* to = static_cast<float*>(data) + kParts * (offset + (first_d + channel) * stride_d);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (channel >= channels || first_n + n >= p.dstate) break;
      const int64_t at = kParts * (first_n + n) * stride_n;
      if constexpr (kComplex) {
        to[at] = h[n].x;
        to[at + 1] = h[n].y;
      } else {
        to[at] = h[n];
      }
    }
  }

  __device__ void stage(int64_t t, int steps) const {
    const int64_t group = head / (p.nheads / p.ngroups);
    if (p.B.data != nullptr)
      stage_coefficients(plane_of<const T>(p.B, row.batch, group), t, steps, s.B);
    if (p.C.data != nullptr)
      stage_coefficients(plane_of<const T>(p.C, row.batch, group), t, steps, s.C);

    const Plane<const T> u = plane_of<const T>(p.u, row.batch, head);
    const Plane<const T> delta = plane_of<const T>(p.delta, row.batch, head);
    for_each_element(shape.block_d, shape.block_l, steps, u.stride_t < u.stride_i,
                     [&](int d, int i) {
                       float dt = 0, x = 0;
                       if (d < channels) {
                         dt = to_float(delta.at(first_d + d, t + i));
                         if (p.delta_bias.data != nullptr) dt += parameter(p.delta_bias, d);
                         if (p.delta_softplus) dt = softplus(dt);
                         x = dt * to_float(u.at(first_d + d, t + i));
                       }
                       s.delta[i * s.stride_d + d] = dt;
                       s.delta_u[i * s.stride_d + d] = x;
                     });
  }

  // D or delta_bias of a channel of this block.
  __device__ float parameter(const Strided<2>& tensor, int d) const {
    return static_cast<const float*>(
        tensor.data)[head * tensor.stride[0] + (first_d + d) * tensor.stride[1]];
  }

  // The states that no n < dstate stands for get zeros.
  __device__ void stage_coefficients(const Plane<const T>& from, int64_t t, int steps,
                                     float* to) const {
    const int width = shape.lanes * kN * kParts;
    for_each_element(width, shape.block_l, steps, from.stride_t < from.stride_i,
                     [&](int i, int step) {
                       const int n = i / kParts, part = i % kParts;
                       to[step * s.stride_n + i] =
                           n < p.dstate ? to_float(from.at(n, kParts * (t + step) + part)) : 0.0f;
                     });
  }

  __device__ void advance_states(int steps) {
    const bool varying_B = p.B.data != nullptr, varying_C = p.C.data != nullptr;
    for (int i = 0; i < steps; ++i) {
      const float dt = s.delta[i * s.stride_d + channel], x = s.delta_u[i * s.stride_d + channel];
      if (varying_B) load_staged(s.B + i * s.stride_n, B);
      if (varying_C) load_staged(s.C + i * s.stride_n, C);
      float y = 0;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        h[n] = advance(decay(dt, A[n]), h[n], x, B[n]);
        y += real_product(C[n], h[n]);
      }
      for (int lanes = shape.lanes >> 1; lanes > 0; lanes >>= 1)
        y += __shfl_xor_sync(~0u, y, lanes);
      if (first_n == 0) {
        s.delta_u[i * s.stride_d + channel] = kParts * y;  // complex: 2 Re Σ C h
        // Kahan's summation: a million steps lose no more than one.
        const float added = dt - delta_sum_lost, after = delta_sum + added;
        delta_sum_lost = (after - delta_sum) - added;
        delta_sum = after;
      }
    }
  }

  __device__ void load_staged(const float* row_of_step, Value (&to)[kN]) const {
    constexpr int kFloats = kN * kParts, kAtOnce = kFloats < 4 ? kFloats : 4;
    float values[kFloats];
#pragma unroll
    for (int i = 0; i < kFloats; i += kAtOnce) {
      const auto part = load_vector<kAtOnce>(row_of_step + first_n * kParts + i);
      for (int k = 0; k < kAtOnce; ++k) values[i + k] = part.value[k];
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if constexpr (kComplex)
        to[n] = {values[2 * n], values[2 * n + 1]};
      else
        to[n] = values[n];
    }
  }

  // out = (y + D u) SiLU(z)
  __device__ void finish(int64_t t, int steps) const {
    const Plane<const T> u = plane_of<const T>(p.u, row.batch, head);
    const Plane<const T> z = plane_of<const T>(p.z, row.batch, head);
    const Plane<T> out = plane_of<T>(p.out, row.batch, head);
    for_each_element(shape.block_d, shape.block_l, steps, out.stride_t < out.stride_i,
                     [&](int d, int i) {
                       if (d >= channels) return;
                       float y = s.delta_u[i * s.stride_d + d];
                       if (p.D.data != nullptr)
                         y += parameter(p.D, d) * to_float(u.at(first_d + d, t + i));
                       if (z.data != nullptr) y *= silu(to_float(z.at(first_d + d, t + i)));
                       out.at(first_d + d, t + i) = from_float<T>(y);
                     });
  }

  const SelectiveScanFwdParams& p;
  const Shape& shape;
  const Staging& s;
  const ScanRow row;
  const int64_t row_index, head, first_d;
  int channel, channels, first_n;  // this thread's channel and first state; channels of the block
  Value A[kN], B[kN], C[kN], h[kN];
  float delta_sum = 0, delta_sum_lost = 0;
};

// The row's first entry in chunk_states: packed rows follow one another.
__device__ int64_t first_chunk(const SelectiveScanFwdParams& p, int64_t row) {
  if (p.chunk_states.data == nullptr || p.cu_seqlens.data == nullptr) return 0;
  __shared__ unsigned long long chunks;
  __syncthreads();
  if (threadIdx.x == 0) chunks = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int64_t i = threadIdx.x; i < row; i += kThreads) {
    const int64_t length = index_at(p.cu_seqlens, i + 1) - index_at(p.cu_seqlens, i);
    mine += length < 0 ? 0 : (length + p.chunk_size - 1) / p.chunk_size;
  }
  atomicAdd(&chunks, mine);
  __syncthreads();
  return static_cast<int64_t>(chunks);
}

template <typename T, bool kComplex, int kN>
__global__ void __launch_bounds__(kThreads)
    selective_scan_general_fwd_kernel(SelectiveScanFwdParams p, Shape shape, uint32_t* faults) {
  extern __shared__ float4 memory[];
  const Staging staging(reinterpret_cast<float*>(memory), shape, shape.lanes * kN,
                        kComplex ? 2 : 1);
  const int64_t tasks = p.rows * p.nheads * shape.tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t tile = task % shape.tiles, head = task / shape.tiles % p.nheads;
    const int64_t row = task / shape.tiles / p.nheads;
    Scan<T, kComplex, kN> scan(p, shape, staging, scan_row(p, row, faults), row, head,
                               tile * shape.block_d);
    scan.run(first_chunk(p, row));
  }
}

int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Steps staged at a time depend on the states alone, so that sums over them do.
Shape shape_of(const SelectiveScanFwdParams& p, const Context& context) {
  const int64_t channels = p.nheads * p.headdim;
  const int64_t rows = context.batch_invariant() ? 1 : p.rows;
  constexpr int64_t kThreadsPerSm = 512;
  Shape shape{};
  shape.few =
      p.dstate <= 64 && rows * channels * p.dstate / 8 < kThreadsPerSm * context.cuda().num_sms();
  shape.lanes = power_of_two_from(ceil_div(p.dstate, shape.few ? 2 : 8));
  shape.block_d = kThreads / shape.lanes;
  const int numbers = power_of_two_from(p.dstate) * (p.complex ? 2 : 1);
  shape.block_l = std::min(kMaxBlockL, std::max(1, 4096 / numbers));
  shape.tiles = ceil_div(p.headdim, shape.block_d);
  return shape;
}

}  // namespace

void selective_scan_general_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  const Shape shape = shape_of(p, exec.context);
  with_type(p.dtype, [&](auto* type) {
    with_bool(p.complex, [&](auto is_complex) {
      with_bool(shape.few, [&](auto few) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr bool kComplex = decltype(is_complex)::value;
        constexpr int kN = decltype(few)::value ? 2 : 8;
        launch_kernel("selective_scan", selective_scan_general_fwd_kernel<T, kComplex, kN>,
                      {blocks_for(p.rows * p.nheads * shape.tiles, 1), kThreads,
                       Staging::bytes(shape, shape.lanes * kN, kComplex ? 2 : 1)},
                      exec, p, shape, exec.context.cuda().faults());
      });
    });
  });
}

}  // namespace ssmcore::cuda
