// The selective scan in full generality: real or complex A, constant or varying B and C, any
// option. A block takes some channels of one row, several lanes a channel, and steps through time
// with the states in registers. Operands are staged in shared memory, some steps at a time.
#include <string>
#include <type_traits>

#include "device/state.cuh"
#include "launch.h"
#include "scan_plane.cuh"
#include "scan_row.cuh"
#include "selective_scan.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxBlockL = 32;
constexpr int kAtOnce = 4;  // loads in flight when operands are staged
constexpr int kSteps = 4;   // taken together, so that their latencies overlap

constexpr int kFewStates = 2, kManyStates = 8;  // of a thread
constexpr int kMaxStates = 32 * kManyStates;

// How blocks and lanes are laid out. All but `tiles` are powers of two.
struct Shape {
  int states;     // of a thread
  int lanes;      // of a channel, within one warp
  int block_d;    // channels of a block
  int block_l;    // steps staged at a time
  int64_t tiles;  // blocks that make one head
};

// Shared memory, in floats. Rows of delta and delta_u are of one step, padded against bank
// conflicts; rows of varying B and C keep 16-byte alignment.
struct Staging {
  int stride_d, stride_n;
  float *B, *C;            // varying: (block_l, states of all lanes, parts); constant: (…, threads)
  float *delta, *delta_u;  // (block_l, block_d); y replaces delta_u

  __host__ __device__ Staging(float* memory, const Shape& shape, int numbers)
      : stride_d(shape.block_d + 1), stride_n(shape.lanes * numbers + 4) {
    B = memory;
    C = B + coefficients(shape, numbers);
    delta = C + coefficients(shape, numbers);
    delta_u = delta + shape.block_l * stride_d;
  }
  // `numbers`: of a thread's states.
  __host__ __device__ static int coefficients(const Shape& shape, int numbers) {
    const int varying = shape.block_l * (shape.lanes * numbers + 4), constant = kThreads * numbers;
    return varying > constant ? varying : constant;
  }
  static size_t bytes(const Shape& shape, int numbers) {
    return sizeof(float) * 2 *
           static_cast<size_t>(coefficients(shape, numbers) + shape.block_l * (shape.block_d + 1));
  }
};

// One block's scan over one row of kThreads / lanes channels, kN states a thread.
template <typename T, bool kComplex, int kN>
class Scan {
  using Value = State<kComplex>;
  static constexpr int kParts = kComplex ? 2 : 1, kNumbers = kN * kParts;
  static constexpr int kQuad = kNumbers < 4 ? kNumbers : 4;

 public:
  __device__ Scan(const SelectiveScanFwdParams& p, const Shape& shape, const Staging& s,
                  const ScanRow& row, int64_t row_index, int64_t head, int64_t first_d)
      : p(p), shape(shape), s(s), row(row), row_index(row_index), head(head), first_d(first_d) {
    channel = static_cast<int>(threadIdx.x) / shape.lanes;
    first_n = static_cast<int>(threadIdx.x) % shape.lanes * kN;
    channels = static_cast<int>(min(static_cast<int64_t>(shape.block_d), p.headdim - first_d));
  }

  __device__ void run(int64_t chunk) {
    load_states(p.A.data, p.A.stride[0] * head, p.A.stride[1], p.A.stride[2], h);
#pragma unroll
    for (int n = 0; n < kN; ++n) A[n] = rate_of(h[n]);
    if (p.constant_B.data != nullptr) keep_constant(p.constant_B, s.B);
    if (p.constant_C.data != nullptr) keep_constant(p.constant_C, s.C);
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

  // Operands of the next steps, and zeros up to a multiple of kSteps, which leave states as they
  // are.
  __device__ void stage(int64_t t, int steps) const {
    const int64_t group = head / (p.nheads / p.ngroups);
    if (p.B.data != nullptr)
      stage_coefficients(plane_of<const T>(p.B, row.batch, group), t, steps, s.B);
    if (p.C.data != nullptr)
      stage_coefficients(plane_of<const T>(p.C, row.batch, group), t, steps, s.C);

    const Plane<const T> u = plane_of<const T>(p.u, row.batch, head);
    const Plane<const T> delta = plane_of<const T>(p.delta, row.batch, head);
    struct Inputs {
      T delta, u;
    };
    for_each_element<kThreads, kAtOnce>(
        shape.block_d, shape.block_l, padded(steps), u.stride_t < u.stride_i,
        [&](int d, int i) {
          const bool there = d < channels && i < steps;
          return there ? Inputs{delta.at(first_d + d, t + i), u.at(first_d + d, t + i)} : Inputs{};
        },
        [&](int d, int i, const Inputs& loaded) {
          float dt = to_float(loaded.delta);
          if (p.delta_bias.data != nullptr && d < channels) dt += parameter(p.delta_bias, d);
          if (p.delta_softplus) dt = softplus(dt);
          if (i >= steps) dt = 0;
          s.delta[i * s.stride_d + d] = dt;
          s.delta_u[i * s.stride_d + d] = dt * to_float(loaded.u);
        });
  }

  __device__ static int padded(int steps) { return (steps + kSteps - 1) / kSteps * kSteps; }

  // D or delta_bias of a channel of this block.
  __device__ float parameter(const Strided<2>& tensor, int d) const {
    return static_cast<const float*>(
        tensor.data)[head * tensor.stride[0] + (first_d + d) * tensor.stride[1]];
  }

  // The states that no n < dstate stands for get zeros.
  __device__ void stage_coefficients(const Plane<const T>& from, int64_t t, int steps,
                                     float* to) const {
    for_each_element<kThreads, kAtOnce>(
        shape.lanes * kNumbers, shape.block_l, padded(steps), from.stride_t < from.stride_i,
        [&](int i, int step) {
          const int n = i / kParts, part = i % kParts;
          return n < p.dstate && step < steps ? from.at(n, kParts * (t + step) + part) : T{};
        },
        [&](int i, int step, T value) { to[step * s.stride_n + i] = to_float(value); });
  }

  // Constant B or C, a quad of numbers after the other, each thread for itself.
  __device__ void keep_constant(const Strided<3>& tensor, float* to) const {
    Value values[kN];
    load_states(tensor.data, tensor.stride[0] * head, tensor.stride[1], tensor.stride[2], values);
    const float* numbers = reinterpret_cast<const float*>(values);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      to[(i / kQuad * kThreads + threadIdx.x) * kQuad + i % kQuad] = numbers[i];
  }

  // Where a thread finds its B or C: quad q of step i at data + i step + q quad.
  struct Coefficients {
    const float* data;
    int step, quad;

    __device__ void load(int i, Value (&to)[kN]) const {
      float numbers[kNumbers];
#pragma unroll
      for (int q = 0; q < kNumbers / kQuad; ++q) {
        const auto loaded = load_vector<kQuad>(data + i * step + q * quad);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) numbers[q * kQuad + k] = loaded.value[k];
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if constexpr (kComplex)
          to[n] = {numbers[2 * n], numbers[2 * n + 1]};
        else
          to[n] = numbers[n];
      }
    }
  };
  __device__ Coefficients coefficients(const float* staged, bool varying) const {
    if (varying) return {staged + first_n * kParts, s.stride_n, kQuad};
    return {staged + threadIdx.x * kQuad, 0, kThreads * kQuad};
  }

  __device__ void advance_states(int steps) {
    const Coefficients all_B = coefficients(s.B, p.B.data != nullptr);
    const Coefficients all_C = coefficients(s.C, p.C.data != nullptr);
    for (int i = 0; i < steps; i += kSteps) {
      float y[kSteps] = {}, sum = 0;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int at = (i + k) * s.stride_d + channel;
        const float dt = s.delta[at], x = s.delta_u[at];
        Value B[kN], C[kN];
        all_B.load(i + k, B);
        all_C.load(i + k, C);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          h[n] = advance(decay(dt, A[n]), h[n], x, B[n]);
          y[k] += real_product(C[n], h[n]);
        }
        sum += dt;
      }
      for (int lanes = shape.lanes >> 1; lanes > 0; lanes >>= 1)
#pragma unroll
        for (int k = 0; k < kSteps; ++k) y[k] += __shfl_xor_sync(~0u, y[k], lanes);
      __syncwarp();  // y goes where the lanes have read delta_u
      if (first_n == 0) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          s.delta_u[(i + k) * s.stride_d + channel] = kParts * y[k];  // complex: 2 Re Σ C h
        // Kahan's summation: a million steps lose no more than a few.
        const float added = sum - delta_sum_lost, after = delta_sum + added;
        delta_sum_lost = (after - delta_sum) - added;
        delta_sum = after;
      }
    }
  }

  // out = (y + D u) SiLU(z)
  __device__ void finish(int64_t t, int steps) const {
    const Plane<const T> u = plane_of<const T>(p.u, row.batch, head);
    const Plane<const T> z = plane_of<const T>(p.z, row.batch, head);
    const Plane<T> out = plane_of<T>(p.out, row.batch, head);
    struct Inputs {
      T u, z;
    };
    for_each_element<kThreads, kAtOnce>(
        shape.block_d, shape.block_l, steps, out.stride_t < out.stride_i,
        [&](int d, int i) {
          Inputs inputs{};
          if (p.D.data != nullptr && d < channels) inputs.u = u.at(first_d + d, t + i);
          if (z.data != nullptr && d < channels) inputs.z = z.at(first_d + d, t + i);
          return inputs;
        },
        [&](int d, int i, const Inputs& inputs) {
          if (d >= channels) return;
          float y = s.delta_u[i * s.stride_d + d];
          if (p.D.data != nullptr) y += parameter(p.D, d) * to_float(inputs.u);
          if (z.data != nullptr) y *= silu(to_float(inputs.z));
          out.at(first_d + d, t + i) = from_float<T>(y);
        });
  }

  const SelectiveScanFwdParams& p;
  const Shape& shape;
  const Staging& s;
  const ScanRow row;
  const int64_t row_index, head, first_d;
  int channel, channels, first_n;  // this thread's channel and first state; channels of the block
  Rate<kComplex> A[kN];
  Value h[kN];
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
__global__ void __launch_bounds__(kThreads, 4)
    selective_scan_general_fwd_kernel(SelectiveScanFwdParams p, Shape shape, uint32_t* faults) {
  extern __shared__ float4 memory[];
  const Staging staging(reinterpret_cast<float*>(memory), shape, kN * (kComplex ? 2 : 1));
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

// Few states a thread where more threads are needed to fill the GPU. The steps staged at a time
// depend on the states alone, so that sums over them do.
Shape shape_of(const SelectiveScanFwdParams& p, const Context& context) {
  constexpr int64_t kThreadsToFill = 256;  // an SM
  const int64_t rows = context.batch_invariant() ? 1 : p.rows;
  const int64_t threads = rows * p.nheads * p.headdim * p.dstate / kManyStates;
  const bool few =
      p.dstate <= 32 * kFewStates && threads < kThreadsToFill * context.cuda().num_sms();
  Shape shape{};
  shape.states = few ? kFewStates : kManyStates;
  shape.lanes = power_of_two_from(ceil_div(p.dstate, shape.states));
  shape.block_d = kThreads / shape.lanes;
  const int numbers = power_of_two_from(p.dstate) * (p.complex ? 2 : 1);
  shape.block_l = std::min(kMaxBlockL, 4096 / numbers);
  shape.tiles = ceil_div(p.headdim, shape.block_d);
  return shape;
}

}  // namespace

void selective_scan_general_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.dstate > kMaxStates)
    throw Error(ErrorCode::unsupported, "selective_scan: dstate is " + std::to_string(p.dstate) +
                                            ", on CUDA devices it is at most " +
                                            std::to_string(kMaxStates));
  const Shape shape = shape_of(p, exec.context);
  with_type(p.dtype, [&](auto* type) {
    with_bool(p.complex, [&](auto is_complex) {
      with_bool(shape.states == kFewStates, [&](auto is_few) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr bool kComplex = decltype(is_complex)::value;
        constexpr int kN = decltype(is_few)::value ? kFewStates : kManyStates;
        launch_kernel("selective_scan", selective_scan_general_fwd_kernel<T, kComplex, kN>,
                      {blocks_for(p.rows * p.nheads * shape.tiles, 1), kThreads,
                       Staging::bytes(shape, kN * (kComplex ? 2 : 1))},
                      exec, p, shape, exec.context.cuda().faults());
      });
    });
  });
}

}  // namespace ssmcore::cuda
