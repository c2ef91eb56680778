// The gradients of the RMS norm on the GPU, in one pass over memory. With n = v / sqrt(mean(v²) +
// eps) and y = weight n: dn = weight dy and dv = (dn - n mean(dn n)) / sqrt(mean(v²) + eps). A
// group of a row has a team of lanes, which goes on to the same group of other rows: so each thread
// keeps its share of dweight in registers, and a row's inputs are on their way to shared memory
// while the one before it is worked on.
#include "../cpp/src/rms_norm_params.h"
#include "../cpp/src/scratch.h"
#include "any_type.cuh"
#include "column_sums.h"
#include "device/async_copy.cuh"
#include "device/lanes.cuh"
#include "device/math.cuh"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "rms_norm_bwd";
// Of a block, and of the blocks that share an SM.
constexpr int kMaxThreads = 640;
constexpr int kStages = 3;               // rows whose inputs a block has room for
constexpr int kMaxLanes = 640;           // of a row, or of its group
constexpr size_t kReservedBytes = 2048;  // of shared memory, of each block
constexpr int kSmallThreads = 128;       // of a block of several teams
constexpr int kElementThreads = 256;     // of a block of single elements

// How the work is divided. dweight is summed over the rows of each line, and then over the lines.
struct Division {
  int lanes;  // of a team
  int64_t groups, lines;
  int pieces;  // of 16 bytes that a thread reads of a row
};

// A thread's place: which of its team's lanes it is, the group whose first element in any row is
// `first`, and its line: rows `line`, `line + lines`, …
struct Place {
  int64_t line, first;
  int lane;

  __device__ Place(const RmsNormFwdParams& p, const Division& division) {
    const unsigned in_block = threadIdx.x / division.lanes;
    const int64_t team =
        static_cast<int64_t>(blockIdx.x) * (blockDim.x / division.lanes) + in_block;
    line = team / division.groups;
    first = team % division.groups * p.group_size;
    lane = static_cast<int>(threadIdx.x - in_block * division.lanes);
  }
};

// What a thread reads of a row.
struct Inputs {
  Raw x, residual, z, dout, dresidual_out;
};

// Pieces of 16 bytes that eight elements of a type are.
__host__ __device__ constexpr int pieces_of(DType dtype) {
  return dtype == DType::float32 ? 2 : 1;
}

__device__ __forceinline__ void store_gradient(const StridedGradient<2>& gradient, int64_t at,
                                               const float (&values)[kEight]) {
  if (!gradient.data) return;
  float sum[kEight] = {};
  if (gradient.accumulate)
    to_floats(load_raw(gradient.data, gradient.dtype, at), gradient.dtype, sum);
#pragma unroll
  for (int i = 0; i < kEight; ++i) sum[i] += values[i];
  store_eight(gradient.data, gradient.dtype, at, sum);
}

__device__ __forceinline__ void store_gradient(const StridedGradient<2>& gradient, int64_t at,
                                               float value) {
  if (!gradient.data) return;
  if (gradient.accumulate) value += load_element(gradient.data, gradient.dtype, at);
  store_element(gradient.data, gradient.dtype, at, value);
}

// What the gradients of an element are made of.
struct Terms {
  float r, z, dweighted;  // dweighted: of weight n silu(z) by silu(z)
  float v, dy, dn;
  bool gate_first;

  __device__ Terms(float r, float z, float dout, float weight, bool gate_first, bool gate_last)
      : r(r),
        z(z),
        dweighted(dout * weight),
        v(gate_first ? r * silu(z) : r),
        dy(gate_last ? dout * silu(z) : dout),
        dn(dy * weight),
        gate_first(gate_first) {}

  // The gradients of v, and through its gate of r and z.
  __device__ float dv(float scale, float mean) const { return scale * (dn - v * scale * mean); }
  __device__ float dr(float dv) const { return gate_first ? dv * silu(z) : dv; }
  __device__ float dz(float dv, float scale) const {
    return (gate_first ? dv * r : dweighted * v * scale) * silu_slope(z);
  }
};

// kOne: a thread has one vector of a row. Of more, what is needed again is read again, and sums are
// kept in memory; both come from the caches. kPlain: neither residual nor gate.
template <bool kOne, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_bwd_kernel(const __grid_constant__ RmsNormBwdParams p, const Division division,
                        float* sums) {
  extern __shared__ uint4 ring[];  // (kStages, pieces, threads)
  const RmsNormFwdParams& fwd = p.fwd;
  const bool has_residual = !kPlain && fwd.residual.data, has_gate = !kPlain && fwd.z.data;
  const bool gate_first = has_gate && !fwd.norm_before_gate;
  const bool gate_last = has_gate && fwd.norm_before_gate;
  const Place place(fwd, division);
  const auto begin = [&](int j) {
    return static_cast<int64_t>(place.lane + j * division.lanes) * kEight;
  };
  const auto is_inside = [&](int64_t row, int j) {
    return place.line < division.lines && row < fwd.rows && begin(j) < fwd.group_size;
  };
  const auto at = [&](const Strided<2>& tensor, int64_t row, int j) {
    return row * tensor.stride[0] + place.first + begin(j);
  };
  // Calls body(operand, its dtype, where its eight elements go).
  const auto for_each_input = [&](Inputs& in, const auto& body) {
    body(fwd.x, fwd.dtype, in.x);
    if (has_residual) body(fwd.residual, fwd.residual_dtype, in.residual);
    if (has_gate) body(fwd.z, fwd.z_dtype, in.z);
    body(p.dout, p.dout_dtype, in.dout);
    if (p.dresidual_out.data) body(p.dresidual_out, p.dresidual_out_dtype, in.dresidual_out);
  };
  const auto of_stage = [&](int stage) {
    return ring + stage * division.pieces * blockDim.x + threadIdx.x;
  };
  const auto begin_copies = [&](int64_t row, int stage) {
    uint4* to = of_stage(stage);
    Inputs unused;
    if (is_inside(row, 0))
      for_each_input(unused, [&](const Strided<2>& tensor, DType dtype, Raw&) {
        const char* from =
            static_cast<const char*>(tensor.data) + at(tensor, row, 0) * (2 * pieces_of(dtype));
        for (int i = 0; i < pieces_of(dtype); ++i, to += blockDim.x)
          copy_async_16(to, from + 16 * i, true);
      });
    commit_copies();
  };
  const auto inputs_of = [&](int64_t row, int j, int stage) {
    Inputs in;
    const uint4* from = of_stage(stage);
    for_each_input(in, [&](const Strided<2>& tensor, DType dtype, Raw& raw) {
      if (!kOne) {
        raw = load_raw(tensor.data, dtype, at(tensor, row, j));
        return;
      }
      raw.low = from[0];
      if (dtype == DType::float32) raw.high = from[blockDim.x];
      from += pieces_of(dtype) * blockDim.x;
    });
    return in;
  };
  const auto load_weight = [&](int j, float (&weight)[kEight]) {
#pragma unroll
    for (float& w : weight) w = 1.0f;
    if (fwd.weight.data && begin(j) < fwd.group_size)
      to_floats(load_raw(fwd.weight.data, fwd.weight_dtype, place.first + begin(j)),
                fwd.weight_dtype, weight);
  };
  // Calls body(i, terms) for a vector's elements.
  const auto for_each = [&](const Inputs& in, const float (&weight)[kEight], const auto& body) {
    float r[kEight], z[kEight] = {}, dout[kEight];
    to_floats(in.x, fwd.dtype, r);
    if (has_residual) {
      float residual[kEight];
      to_floats(in.residual, fwd.residual_dtype, residual);
#pragma unroll
      for (int i = 0; i < kEight; ++i) r[i] += residual[i];
    }
    if (has_gate) to_floats(in.z, fwd.z_dtype, z);
    to_floats(in.dout, p.dout_dtype, dout);
#pragma unroll
    for (int i = 0; i < kEight; ++i)
      body(i, Terms(r[i], z[i], dout[i], weight[i], gate_first, gate_last));
  };

  // Of a line's rows so far; the first overwrites what is in memory.
  const auto sum_at = [&](int j) { return place.line * fwd.dim + place.first + begin(j); };

  const int64_t per_vector = division.lanes * kEight;  // of all lanes
  const int64_t vectors = kOne ? 1 : (fwd.group_size + per_vector - 1) / per_vector;
  float weight[kEight], dweight[kEight] = {};
  if (kOne) load_weight(0, weight);
  int turn = 0, stage = 0;
  if (kOne)
    for (int ahead = 0; ahead < kStages - 1; ++ahead)
      begin_copies(place.line + ahead * division.lines, ahead);
#pragma unroll 1
  for (int64_t first = 0; first < fwd.rows; first += division.lines, turn ^= 1) {
    const int64_t row = first + place.line;
    if (kOne) {
      wait_for_copies<kStages - 2>();
      begin_copies(row + (kStages - 1) * division.lines, (stage + kStages - 1) % kStages);
    }
    float totals[2] = {};  // Σ v² and Σ dn v
    for (int j = 0; j < vectors; ++j) {
      if (!is_inside(row, j)) continue;
      if (!kOne) load_weight(j, weight);
      for_each(inputs_of(row, j, stage), weight, [&](int, const Terms& t) {
        totals[0] += t.v * t.v;
        totals[1] += t.dn * t.v;
      });
    }
    sum_over_lanes(totals, division.lanes, turn);
    const float size = static_cast<float>(fwd.group_size);
    const float scale = 1.0f / sqrtf(totals[0] / size + fwd.eps);
    const float mean = totals[1] / size * scale;  // of dn n

    for (int j = 0; j < vectors; ++j) {
      if (!is_inside(row, j)) continue;
      const Inputs in = inputs_of(row, j, stage);
      if (!kOne) {
        load_weight(j, weight);
        if (sums && first > 0)
          to_floats(load_raw(sums, DType::float32, sum_at(j)), DType::float32, dweight);
      }
      float dr[kEight] = {}, dz[kEight];
      if (p.dresidual_out.data) to_floats(in.dresidual_out, p.dresidual_out_dtype, dr);
      for_each(in, weight, [&](int i, const Terms& t) {
        const float dv = t.dv(scale, mean);
        dweight[i] += t.dy * t.v * scale;
        dr[i] += t.dr(dv);
        dz[i] = t.dz(dv, scale);
      });
      if (has_gate) store_gradient(p.dz, at(p.dz, row, j), dz);
      store_gradient(p.dx, at(p.dx, row, j), dr);
      store_gradient(p.dresidual, at(p.dresidual, row, j), dr);
      if (!kOne) {
        if (sums) store_eight(sums, DType::float32, sum_at(j), dweight);
#pragma unroll
        for (float& sum : dweight) sum = 0.0f;
      }
    }
    stage = (stage + 1) % kStages;
  }
  if (kOne && sums && is_inside(place.line, 0))
    store_eight(sums, DType::float32, sum_at(0), dweight);
}

// Any strides, alignment and size, element by element; rows are read twice.
__global__ void __launch_bounds__(kElementThreads)
    rms_norm_bwd_elements_kernel(const __grid_constant__ RmsNormBwdParams p,
                                 const Division division, float* sums) {
  const RmsNormFwdParams& fwd = p.fwd;
  const Place place(fwd, division);
  const bool gate_first = fwd.z.data && !fwd.norm_before_gate;
  const bool gate_last = fwd.z.data && fwd.norm_before_gate;
  const auto at = [&](const Strided<2>& tensor, int64_t row, int64_t i) {
    return row * tensor.stride[0] + (place.first + i) * tensor.stride[1];
  };
  const auto load = [&](const Strided<2>& tensor, DType dtype, int64_t row, int64_t i) {
    return tensor.data ? load_element(tensor.data, dtype, at(tensor, row, i)) : 0.0f;
  };
  const auto load_weight = [&](int64_t i) {
    return fwd.weight.data ? load_element(fwd.weight.data, fwd.weight_dtype,
                                          (place.first + i) * fwd.weight.stride[0])
                           : 1.0f;
  };
  const auto terms = [&](int64_t row, int64_t i) {
    const float r = load(fwd.x, fwd.dtype, row, i) + load(fwd.residual, fwd.residual_dtype, row, i);
    return Terms(r, load(fwd.z, fwd.z_dtype, row, i), load(p.dout, p.dout_dtype, row, i),
                 load_weight(i), gate_first, gate_last);
  };

  int turn = 0;
  for (int64_t first = 0; first < fwd.rows; first += division.lines, turn ^= 1) {
    const int64_t row = first + place.line;
    const int64_t end = place.line < division.lines && row < fwd.rows ? fwd.group_size : 0;
    float totals[2] = {};
    for (int64_t i = place.lane; i < end; i += division.lanes) {
      const Terms t = terms(row, i);
      totals[0] += t.v * t.v;
      totals[1] += t.dn * t.v;
    }
    sum_over_lanes(totals, division.lanes, turn);
    const float size = static_cast<float>(fwd.group_size);
    const float scale = 1.0f / sqrtf(totals[0] / size + fwd.eps);
    const float mean = totals[1] / size * scale;

    for (int64_t i = place.lane; i < end; i += division.lanes) {
      const Terms t = terms(row, i);
      const float dv = t.dv(scale, mean);
      const float dr = t.dr(dv) + load(p.dresidual_out, p.dresidual_out_dtype, row, i);
      if (sums) {
        float& sum = sums[place.line * fwd.dim + place.first + i];
        sum = (first == 0 ? 0.0f : sum) + t.dy * t.v * scale;
      }
      store_gradient(p.dz, at(p.dz, row, i), t.dz(dv, scale));
      store_gradient(p.dx, at(p.dx, row, i), dr);
      store_gradient(p.dresidual, at(p.dresidual, row, i), dr);
    }
  }
}

// Whether rows can be read by vectors.
bool has_vectors(const RmsNormBwdParams& p) {
  const RmsNormFwdParams& fwd = p.fwd;
  const auto has = [&](const Strided<2>& tensor) {
    return !tensor || ((tensor.stride[1] == 1 || fwd.dim == 1) && is_aligned(tensor.data, 16) &&
                       (fwd.rows == 1 || tensor.stride[0] % kEight == 0));
  };
  return fwd.group_size % kEight == 0 && has(fwd.x) && has(fwd.residual) && has(fwd.z) &&
         has(p.dout) && has(p.dresidual_out) && has(p.dx) && has(p.dresidual) && has(p.dz) &&
         (!fwd.weight || (fwd.weight.stride[0] == 1 && is_aligned(fwd.weight.data, 16)));
}

struct Plan {
  void (*kernel)(RmsNormBwdParams, Division, float*);
  Division division{};
  int threads;
  size_t shared_bytes = 0;

  Plan(const RmsNormBwdParams& p, const Context& context) {
    const DeviceState& device = context.cuda();
    const int64_t vectors = p.fwd.group_size / kEight;
    division.lanes = lanes_for(vectors, kMaxLanes);
    threads = threads_for(division.lanes, kSmallThreads);
    const size_t most_shared = device.shared_memory_per_block() - kReservedBytes;
    if (!has_vectors(p)) {
      kernel = rms_norm_bwd_elements_kernel;
      division.lanes = lanes_for(p.fwd.group_size, kElementThreads);
      threads = threads_for(division.lanes, kSmallThreads);
    } else if (vectors > kMaxLanes || ring_bytes(p) > most_shared) {
      kernel = rms_norm_bwd_kernel<false, false>;
    } else {
      kernel = p.fwd.residual || p.fwd.z ? rms_norm_bwd_kernel<true, false>
                                         : rms_norm_bwd_kernel<true, true>;
      division.pieces = pieces(p);
      shared_bytes = ring_bytes(p);
    }
    const size_t room = device.shared_memory_per_block() / (shared_bytes + kReservedBytes);
    const int64_t blocks =
        device.num_sms() * std::min<int64_t>(kMaxThreads / threads, static_cast<int64_t>(room));
    division.groups = p.fwd.dim / p.fwd.group_size;
    division.lines =
        std::min(p.fwd.rows, ceil_div(blocks * (threads / division.lanes), division.groups));
  }

  // That a thread with one vector reads of a row.
  static int pieces(const RmsNormBwdParams& p) {
    int count = 0;
    const auto add = [&](const Strided<2>& tensor, DType dtype) {
      if (tensor) count += pieces_of(dtype);
    };
    add(p.fwd.x, p.fwd.dtype);
    add(p.fwd.residual, p.fwd.residual_dtype);
    add(p.fwd.z, p.fwd.z_dtype);
    add(p.dout, p.dout_dtype);
    add(p.dresidual_out, p.dresidual_out_dtype);
    return count;
  }
  size_t ring_bytes(const RmsNormBwdParams& p) const {
    return sizeof(uint4) * kStages * pieces(p) * threads;
  }
  unsigned blocks() const {
    return blocks_for(division.lines * division.groups, threads / division.lanes);
  }
  // The sums of lines (lines, dim).
  float* sums(const RmsNormBwdParams& p, Scratch& scratch) const {
    return p.dweight ? scratch.floats({division.lines, p.fwd.dim}) : nullptr;
  }
};

}  // namespace

size_t rms_norm_bwd_workspace_size(const RmsNormBwdParams& p, const Context& context) {
  const Plan plan(p, context);
  Scratch scratch = Scratch::nowhere();
  if (plan.sums(p, scratch))
    scratch.bytes(column_sums_workspace_size(plan.division.lines, p.fwd.dim));
  return scratch.used();
}

void rms_norm_bwd(const RmsNormBwdParams& p, const Exec& exec) {
  const Plan plan(p, exec.context);
  Scratch scratch(exec.workspace);
  float* const sums = plan.sums(p, scratch);
  launch_kernel(kOp, plan.kernel, {plan.blocks(), plan.threads, plan.shared_bytes}, exec, p,
                plan.division, sums);
  if (!sums) return;
  Strided<2> lines;
  lines.data = sums;
  lines.stride[0] = p.fwd.dim;
  lines.stride[1] = 1;
  launch_column_sums(kOp, lines, DType::float32, plan.division.lines, p.fwd.dim, p.dweight,
                     scratch.rest(exec));
}

}  // namespace ssmcore::cuda
