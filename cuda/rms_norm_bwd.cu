// The gradients of the RMS norm on the GPU, in one pass over memory. With n = v / sqrt(mean(v²) +
// eps) and y = weight n: dn = weight dy and dv = (dn - n mean(dn n)) / sqrt(mean(v²) + eps). A
// group of a row has a team of lanes, which goes on to the same group of other rows: so each thread
// keeps its share of dweight in registers, and a row's inputs are on their way while the one before
// it is worked on.
#include "../cpp/src/rms_norm_params.h"
#include "../cpp/src/scratch.h"
#include "any_type.cuh"
#include "column_sums.h"
#include "device/lanes.cuh"
#include "device/math.cuh"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "rms_norm_bwd";
// Of a block, and of the blocks that share an SM.
constexpr int kMaxThreads = 640;
constexpr int kSmallThreads = 128;    // of a block of several teams
constexpr int kElementThreads = 256;  // of a block of single elements

// How the work is divided. dweight is summed over the rows of each line, and then over the lines.
struct Division {
  int lanes;  // of a team
  int64_t groups, lines;
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

// A thread's eight elements are two runs of four, `apart` from each other and next to those of its
// neighbours: so a warp's stores fill whole sectors of memory in any type, which of float32 eight
// neighbours would not. There may be fewer runs at the end of a group.
constexpr int kRun = 4;
struct Runs {
  int64_t at;
  int count, apart;

  __device__ Runs shifted(int64_t by) const { return {at + by, count, apart}; }
};

// Zeros beyond the end.
__device__ __forceinline__ Raw load_runs(const void* data, DType dtype, const Runs& runs) {
  Raw raw{};
  if (dtype == DType::float32) {
    const auto* from = static_cast<const float*>(data) + runs.at;
    if (runs.count > 0) raw.low = *reinterpret_cast<const uint4*>(from);
    if (runs.count > 1) raw.high = *reinterpret_cast<const uint4*>(from + runs.apart);
  } else {
    const auto* from = static_cast<const uint16_t*>(data) + runs.at;
    uint2 first{}, second{};
    if (runs.count > 0) first = *reinterpret_cast<const uint2*>(from);
    if (runs.count > 1) second = *reinterpret_cast<const uint2*>(from + runs.apart);
    raw.low = make_uint4(first.x, first.y, second.x, second.y);
  }
  return raw;
}

__device__ __forceinline__ void store_runs(void* data, DType dtype, const Runs& runs,
                                           const float (&values)[kEight]) {
  with_device_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Run = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    const auto words = to_words<T>(values);
    const auto& of_words = reinterpret_cast<const Run(&)[2]>(words);
    T* to = static_cast<T*>(data) + runs.at;
    if (runs.count > 0) *reinterpret_cast<Run*>(to) = of_words[0];
    if (runs.count > 1) *reinterpret_cast<Run*>(to + runs.apart) = of_words[1];
  });
}

// What is read of a row.
struct Inputs {
  Raw x, residual, z, dout, dresidual_out;
};

__device__ __forceinline__ void store_gradient(const StridedGradient<2>& gradient, const Runs& runs,
                                               const float (&values)[kEight]) {
  if (!gradient.data) return;
  float sum[kEight] = {};
  if (gradient.accumulate)
    to_floats(load_runs(gradient.data, gradient.dtype, runs), gradient.dtype, sum);
#pragma unroll
  for (int i = 0; i < kEight; ++i) sum[i] += values[i];
  store_runs(gradient.data, gradient.dtype, runs, sum);
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
// kept in memory; both come from the caches. kPlain: neither residual nor gate. So little is loaded
// that the next row's inputs fit in registers as well.
template <bool kOne, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_bwd_kernel(const __grid_constant__ RmsNormBwdParams p, const Division division,
                        float* sums) {
  const RmsNormFwdParams& fwd = p.fwd;
  constexpr bool kPrefetch = kOne && kPlain;
  const bool has_residual = !kPlain && fwd.residual.data, has_gate = !kPlain && fwd.z.data;
  const bool gate_first = has_gate && !fwd.norm_before_gate;
  const bool gate_last = has_gate && fwd.norm_before_gate;
  const Place place(fwd, division);
  // Of the group, a thread's j-th vector.
  const auto runs_of = [&](int64_t j) {
    const int apart = division.lanes * kRun;
    const int64_t at = place.lane * kRun + j * 2 * apart;
    return Runs{at, (at < fwd.group_size) + (at + apart < fwd.group_size), apart};
  };
  const auto in_row = [&](const Strided<2>& tensor, int64_t row, const Runs& runs) {
    return runs.shifted(row * tensor.stride[0] + place.first);
  };
  const auto exists = [&](int64_t row) { return place.line < division.lines && row < fwd.rows; };
  const auto load = [&](int64_t row, const Runs& runs) {
    Inputs in{};
    if (!exists(row)) return in;
    const auto load_operand = [&](const Strided<2>& tensor, DType dtype) {
      return load_runs(tensor.data, dtype, in_row(tensor, row, runs));
    };
    in.x = load_operand(fwd.x, fwd.dtype);
    if (has_residual) in.residual = load_operand(fwd.residual, fwd.residual_dtype);
    if (has_gate) in.z = load_operand(fwd.z, fwd.z_dtype);
    in.dout = load_operand(p.dout, p.dout_dtype);
    if (p.dresidual_out.data)
      in.dresidual_out = load_operand(p.dresidual_out, p.dresidual_out_dtype);
    return in;
  };
  const auto load_weight = [&](const Runs& runs, float (&weight)[kEight]) {
#pragma unroll
    for (float& w : weight) w = 1.0f;
    if (fwd.weight.data)
      to_floats(load_runs(fwd.weight.data, fwd.weight_dtype, runs.shifted(place.first)),
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
  const auto in_sums = [&](const Runs& runs) {
    return runs.shifted(place.line * fwd.dim + place.first);
  };

  const int64_t per_vector = division.lanes * kEight;  // of all lanes
  const int64_t vectors = kOne ? 1 : (fwd.group_size + per_vector - 1) / per_vector;
  float weight[kEight], dweight[kEight] = {};
  if (kOne) load_weight(runs_of(0), weight);
  Inputs next;
  if (kPrefetch) next = load(place.line, runs_of(0));
  int turn = 0;
#pragma unroll 1
  for (int64_t first = 0; first < fwd.rows; first += division.lines, turn ^= 1) {
    const int64_t row = first + place.line;
    Inputs in;
    float totals[2] = {};  // Σ v² and Σ dn v
    for (int64_t j = 0; j < vectors; ++j) {
      const Runs runs = runs_of(j);
      in = kPrefetch ? next : load(row, runs);
      if (kPrefetch) next = load(row + division.lines, runs);
      if (!kOne) load_weight(runs, weight);
      for_each(in, weight, [&](int, const Terms& t) {
        totals[0] += t.v * t.v;
        totals[1] += t.dn * t.v;
      });
    }
    sum_over_lanes(totals, division.lanes, turn);
    const float size = static_cast<float>(fwd.group_size);
    const float scale = 1.0f / sqrtf(totals[0] / size + fwd.eps);
    const float mean = totals[1] / size * scale;  // of dn n
    if (!exists(row)) continue;

    for (int64_t j = 0; j < vectors; ++j) {
      const Runs runs = runs_of(j);
      if (!kOne) {
        in = load(row, runs);
        load_weight(runs, weight);
        if (sums && first > 0)
          to_floats(load_runs(sums, DType::float32, in_sums(runs)), DType::float32, dweight);
      }
      float dr[kEight] = {}, dz[kEight];
      if (p.dresidual_out.data) to_floats(in.dresidual_out, p.dresidual_out_dtype, dr);
      for_each(in, weight, [&](int i, const Terms& t) {
        const float dv = t.dv(scale, mean);
        dweight[i] += t.dy * t.v * scale;
        dr[i] += t.dr(dv);
        dz[i] = t.dz(dv, scale);
      });
      if (has_gate) store_gradient(p.dz, in_row(p.dz, row, runs), dz);
      store_gradient(p.dx, in_row(p.dx, row, runs), dr);
      store_gradient(p.dresidual, in_row(p.dresidual, row, runs), dr);
      if (!kOne) {
        if (sums) store_runs(sums, DType::float32, in_sums(runs), dweight);
#pragma unroll
        for (float& sum : dweight) sum = 0.0f;
      }
    }
  }
  if (kOne && sums && exists(place.line))
    store_runs(sums, DType::float32, in_sums(runs_of(0)), dweight);
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
  Division division;
  int threads;

  Plan(const RmsNormBwdParams& p, const Context& context) {
    const int64_t vectors = p.fwd.group_size / kEight;
    division.lanes = lanes_for(vectors, kMaxThreads);
    if (!has_vectors(p)) {
      kernel = rms_norm_bwd_elements_kernel;
      division.lanes = lanes_for(p.fwd.group_size, kElementThreads);
    } else if (vectors > kMaxThreads) {
      kernel = rms_norm_bwd_kernel<false, false>;
    } else if (p.fwd.residual || p.fwd.z) {
      kernel = rms_norm_bwd_kernel<true, false>;
    } else {
      kernel = rms_norm_bwd_kernel<true, true>;
    }
    threads = threads_for(division.lanes, kSmallThreads);
    division.groups = p.fwd.dim / p.fwd.group_size;
    const int64_t teams = static_cast<int64_t>(context.cuda().num_sms()) * (kMaxThreads / threads) *
                          (threads / division.lanes);
    division.lines = std::min(p.fwd.rows, ceil_div(teams, division.groups));
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
  launch_kernel(kOp, plan.kernel, {plan.blocks(), plan.threads}, exec, p, plan.division, sums);
  if (!sums) return;
  Strided<2> lines;
  lines.data = sums;
  lines.stride[0] = p.fwd.dim;
  lines.stride[1] = 1;
  launch_column_sums(kOp, lines, DType::float32, plan.division.lines, p.fwd.dim, p.dweight,
                     scratch.rest(exec));
}

}  // namespace ssmcore::cuda
