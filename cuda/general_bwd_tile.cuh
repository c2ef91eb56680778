// The general backward of the scan on one tile: formulas of ssmcore/selective_scan.h.
#pragma once

#include "general_bwd_place.cuh"
#include "scan_plane.cuh"
#include "scan_row.cuh"

namespace ssmcore::cuda {

// Steps of the batch.
struct Segment {
  int64_t index, begin, end;
};

template <typename T, bool kComplex>
class TileBackward {
  using Shape = GeneralBwdShape;
  using Real = RealOf<T>;
  using Place = TilePlace<Real, kComplex>;
  using Quad = typename Place::Quad;
  using States = StatesOfThread<Real, kComplex>;
  using Value = typename States::Value;
  using Rate = std::conditional_t<kComplex, ComplexRate, Real>;
  static constexpr int kThreads = Shape::kThreads, kQuad = Shape::kQuad;
  static constexpr int kParts = Place::kParts, kN = Place::kN;
  static constexpr int kSteps = 4;  // taken together, so that their latencies overlap

 public:
  __device__ TileBackward(const SelectiveScanBwdParams& p, const Shape& s,
                          const GeneralBwdMemory<Real>& memory, const TileStaging<Real>& staging,
                          int64_t head, int64_t tile)
      : p(p),
        fwd(p.fwd),
        s(s),
        memory(memory),
        staging(staging),
        place(fwd, s, head, tile),
        index(head * s.tiles + tile),
        group(head / (fwd.nheads / fwd.ngroups)) {
    A = States(place.load(fwd.A));
#pragma unroll
    for (int n = 0; n < kN; ++n) rate[n] = rate_of(A[n]);
    if (fwd.constant_B.data != nullptr) keep_constant(fwd.constant_B, staging.B);
    if (fwd.constant_C.data != nullptr) keep_constant(fwd.constant_C, staging.C);
  }

  // Keeps the states where segments end within the row.
  __device__ void find_segment_starts(const ScanRow& row) {
    h = States(place.load(fwd.initial_state, row.slot));
    for (int64_t t = row.begin;;) {
      const int64_t boundary = (t / s.segment_l + 1) * s.segment_l;
      if (boundary >= row.end) break;
      for (; t < boundary; t += s.block_l)
        advance_block(row.batch, t,
                      static_cast<int>(min(boundary - t, static_cast<int64_t>(s.block_l))));
      t = boundary;
      segment_start(t, row.batch) = h.quad();
    }
  }

  // Goes back over a row's steps in a segment. Sums of dB and dC go to `slice` of all heads, added
  // to what is there unless the tile is its first.
  __device__ void run(const ScanRow& row, const Segment& segment, int64_t slice, bool is_first) {
    const int64_t begin = max(row.begin, segment.begin), end = min(row.end, segment.end);
    const int64_t blocks = begin < end ? (end - begin + s.block_l - 1) / s.block_l : 0;
    const auto carried = [&](int64_t from) -> Quad& {
      return memory
          .dstate[((from % 2 * s.batch + row.batch) * tiles() + index) * kThreads + threadIdx.x];
    };
    dh = States(row.end > segment.end ? carried(segment.index + 1)
                                      : place.load(p.dlast_state, row.slot));
    h = States(start_of(row, begin));
    for (int64_t block = 0; block + 1 < blocks; ++block) {
      advance_block(row.batch, begin + block * s.block_l, s.block_l);
      block_start(segment, row.batch, begin + (block + 1) * s.block_l) = h.quad();
    }
    const int64_t sums_at = (slice * s.batch + row.batch) * s.segment_l;
    for (int64_t block = blocks - 1; block >= 0; --block) {
      const int64_t t = begin + block * s.block_l;
      if (block + 1 < blocks)
        h = States(block == 0 ? start_of(row, begin) : block_start(segment, row.batch, t));
      const int64_t at = (sums_at + t - segment.begin) * s.quads;
      run_block(row.batch, t, static_cast<int>(min(end - t, static_cast<int64_t>(s.block_l))),
                memory.dB == nullptr ? nullptr : memory.dB + at,
                memory.dC == nullptr ? nullptr : memory.dC + at, is_first);
    }
    if (row.begin < segment.begin)
      carried(segment.index) = dh.quad();
    else
      place.store(p.dinitial_state, row.slot, dh.quad());
  }

  // Adds what the rows have given to the sums of a slice of rows, or begins them.
  __device__ void store_sums(int64_t row_slice, bool begins) const {
    const int64_t at = row_slice * tiles() + index;
    const States* const sums[] = {&dA, &dB, &dC};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      Quad& to = memory.sums[(at * 3 + i) * kThreads + threadIdx.x];
      States sum = *sums[i];
      if (!begins) sum.add(States(to));
      to = sum.quad();
    }
    if (threadIdx.x >= s.tile_d) return;
    Real* const to = memory.channel_sums + at * 2 * s.tile_d + threadIdx.x;
    to[0] = dD + (begins ? 0 : to[0]);
    to[s.tile_d] = ddelta_bias + (begins ? 0 : to[s.tile_d]);
  }

 private:
  __device__ int64_t tiles() const { return fwd.nheads * s.tiles; }

  // The end of the segment before `t`.
  __device__ Quad& segment_start(int64_t t, int64_t batch) const {
    return memory.segment_starts[((t / s.segment_l - 1) * s.batch + batch) * tiles() * kThreads +
                                 index * kThreads + threadIdx.x];
  }
  // Of a block after a row's first in the segment. A row's are block_l apart, and further from
  // those of other rows, so that no two have one place.
  __device__ Quad& block_start(const Segment& segment, int64_t batch, int64_t t) const {
    const int64_t at = ((t - segment.begin) >> (__ffs(s.block_l) - 1)) - 1;
    return memory.starts[((batch * s.starts() + at) * tiles() + index) * kThreads + threadIdx.x];
  }
  // The states before the row's first step in a segment.
  __device__ Quad start_of(const ScanRow& row, int64_t begin) const {
    if (begin <= row.begin) return place.load(fwd.initial_state, row.slot);
    if (!s.starts_in_chunk_states) return segment_start(begin, row.batch);
    const Strided<5>& from = fwd.chunk_states;
    return place.load(from.data,
                      row.batch * from.stride[0] + (begin / fwd.chunk_size - 1) * from.stride[1] +
                          place.head * from.stride[2],
                      from.stride[3], from.stride[4]);
  }

  // Constant B or C, each thread for itself.
  __device__ void keep_constant(const Strided<3>& tensor, Real* to) const {
    store_vector(to + threadIdx.x * kQuad, place.load(tensor));
  }
  // Where a thread finds its B or C of step i in what is staged: at first + i stride.
  struct Coefficients {
    int first, stride;

    __device__ States load(const Real* staged, int i) const {
      return States(load_vector<kQuad>(staged + first + i * stride));
    }
  };
  __device__ Coefficients coefficients(bool varying) const {
    if (varying) return {place.first_n * kParts, staging.stride_n};
    return {static_cast<int>(threadIdx.x) * kQuad, 0};
  }

  __device__ static int padded(int steps) { return (steps + kSteps - 1) / kSteps * kSteps; }

  // D or delta_bias of a channel of this tile; 0 where there is none.
  __device__ Real parameter(const Strided<2>& tensor, int d) const {
    if (tensor.data == nullptr || d >= place.channels) return 0;
    return static_cast<const Real*>(
        tensor.data)[place.head * tensor.stride[0] + (place.first_d + d) * tensor.stride[1]];
  }

  // Operands of the next steps, and zeros up to a multiple of kSteps, which leave states and
  // gradients as they are. C and dy = dout SiLU(z) are for going back.
  template <bool kBack>
  __device__ void stage(int64_t batch, int64_t t, int steps) const {
    stage_coefficients<kBack>(batch, t, steps);
    const Plane<const T> u = plane_of<const T>(fwd.u, batch, place.head);
    const Plane<const T> delta = plane_of<const T>(fwd.delta, batch, place.head);
    const Plane<const T> dout = plane_of<const T>(p.dout, batch, place.head);
    const Plane<const T> z = plane_of<const T>(fwd.z, batch, place.head);
    struct Inputs {
      T u, delta, dout, z;
    };
    for_each_element<kThreads, 1>(
        s.tile_d, s.block_l, padded(steps), u.stride_t < u.stride_i,
        [&](int d, int i) {
          Inputs inputs{};
          if (d >= place.channels || i >= steps) return inputs;
          inputs.u = u.at(place.first_d + d, t + i);
          inputs.delta = delta.at(place.first_d + d, t + i);
          if (kBack) inputs.dout = dout.at(place.first_d + d, t + i);
          if (kBack && z.data != nullptr) inputs.z = z.at(place.first_d + d, t + i);
          return inputs;
        },
        [&](int d, int i, const Inputs& inputs) {
          Real dt = to_real(inputs.delta) + parameter(fwd.delta_bias, d);
          if (fwd.delta_softplus) dt = softplus(dt);
          if (d >= place.channels || i >= steps) dt = 0;
          Real dy = 0;
          if (kBack) dy = to_real(inputs.dout);
          if (kBack && z.data != nullptr) dy *= silu(to_real(inputs.z));
          staging.inputs[i * staging.stride_d + d] = {dt, dt * to_real(inputs.u), dy, 0};
        });
  }

  // Varying B and, for going back, C. The states that no n < dstate stands for get zeros.
  template <bool kBack>
  __device__ void stage_coefficients(int64_t batch, int64_t t, int steps) const {
    const Plane<const T> B = plane_of<const T>(fwd.B, batch, group);
    const Plane<const T> C = kBack ? plane_of<const T>(fwd.C, batch, group) : Plane<const T>{};
    const Plane<const T>& either = B.data != nullptr ? B : C;
    if (either.data == nullptr) return;
    struct Pair {
      T B, C;
    };
    for_each_element<kThreads, 4>(
        s.lanes * kQuad, s.block_l, padded(steps), either.stride_t < either.stride_i,
        [&](int i, int step) {
          Pair pair{};
          const int64_t n = i / kParts, at = kParts * (t + step) + i % kParts;
          if (n >= fwd.dstate || step >= steps) return pair;
          if (B.data != nullptr) pair.B = B.at(n, at);
          if (C.data != nullptr) pair.C = C.at(n, at);
          return pair;
        },
        [&](int i, int step, const Pair& pair) {
          const int at = step * staging.stride_n + i;
          if (B.data != nullptr) staging.B[at] = to_real(pair.B);
          if (C.data != nullptr) staging.C[at] = to_real(pair.C);
        });
  }

  __device__ void advance_block(int64_t batch, int64_t t, int steps) {
    stage<false>(batch, t, steps);
    __syncthreads();
    advance<false>(steps);
    __syncthreads();
  }

  // Every thread's sums over its team, at the team's place in rows [first, first + kSteps) of `to`.
  __device__ void add_team(Real (&sum)[kSteps], int first, Real* to) const {
    const int team = s.team();
    for (int distance = team / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) sum[k] += __shfl_xor_sync(~0u, sum[k], distance);
    if ((threadIdx.x & (team - 1)) != 0) return;
    const int at =
        first * staging.stride_team + (static_cast<int>(threadIdx.x) >> (__ffs(team) - 1));
#pragma unroll
    for (int k = 0; k < kSteps; ++k) to[at + k * staging.stride_team] = sum[k];
  }
  // Where the first team of a channel leaves its sum of step i, and the sum of all its teams.
  __device__ int team_of(int d, int i) const {
    return i * staging.stride_team + d * (s.channel_teams());
  }
  __device__ Real total(const Real* sums, int d, int i) const {
    Real sum = 0;
    for (int k = 0; k < s.channel_teams(); ++k) sum += sums[team_of(d, i) + k];
    return sum;
  }

  __device__ Real* kept(int step, int thread) const {
    return staging.kept + step * staging.stride_kept + thread * kQuad;
  }

  // Goes on over staged steps; where kBack, keeps the states and, if dz is asked for, finds y
  // (without D u).
  template <bool kBack>
  __device__ void advance(int steps) {
    const Coefficients all_B = coefficients(fwd.B.data != nullptr);
    const Coefficients all_C = coefficients(fwd.C.data != nullptr);
    for (int i = 0; i < steps; i += kSteps) {
      Real y[kSteps] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const Quad inputs = staging.inputs[(i + k) * staging.stride_d + place.channel];
        const Real dt = inputs.value[0], x = inputs.value[1];
        const States B_k = all_B.load(staging.B, i + k);
#pragma unroll
        for (int n = 0; n < kN; ++n) h[n] = advance_again(decay(dt, rate[n]), h[n], x, B_k[n]);
        if (!kBack) continue;
        store_vector(kept(i + k, threadIdx.x), h.quad());
        if (p.dz.data == nullptr) continue;
        const States C_k = all_C.load(staging.C, i + k);
#pragma unroll
        for (int n = 0; n < kN; ++n) y[k] += kParts * real_product(C_k[n], h[n]);
      }
      if (kBack && p.dz.data != nullptr) add_team(y, i, staging.y);
    }
  }

  // Goes back over staged steps whose states are kept, `before` being the ones before; leaves dh in
  // their place.
  __device__ void reverse(int steps, const States& before) {
    const Coefficients all_B = coefficients(fwd.B.data != nullptr);
    const Coefficients all_C = coefficients(fwd.C.data != nullptr);
    States dA_sum{}, dB_sum{}, dC_sum{};
    States after(load_vector<kQuad>(kept(padded(steps) - 1, threadIdx.x)));
    for (int i = padded(steps) - kSteps; i >= 0; i -= kSteps) {
      Real dx[kSteps] = {}, ddelta[kSteps] = {};
#pragma unroll
      for (int k = kSteps - 1; k >= 0; --k) {
        const Quad inputs = staging.inputs[(i + k) * staging.stride_d + place.channel];
        const Real dt = inputs.value[0], x = inputs.value[1], dy = kParts * inputs.value[2];
        const States B_k = all_B.load(staging.B, i + k);
        const States C_k = all_C.load(staging.C, i + k);
        const States earlier =
            i + k > 0 ? States(load_vector<kQuad>(kept(i + k - 1, threadIdx.x))) : before;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          dh[n] = add_scaled_conjugate(dh[n], dy, C_k[n]);
          dx[k] = add_inner(dx[k], dh[n], B_k[n]);
          dB_sum[n] = add_scaled(dB_sum[n], x, dh[n]);  // without asking whether B is constant
          dC_sum[n] = add_scaled_conjugate(dC_sum[n], dy, after[n]);
        }
        store_vector(kept(i + k, threadIdx.x), dh.quad());
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          dh[n] = conjugate_product(decay(dt, rate[n]), dh[n]);
          const Value q = conjugate_product(earlier[n], dh[n]);
          ddelta[k] = add_inner(ddelta[k], q, A[n]);
          dA_sum[n] = add_scaled(dA_sum[n], dt, q);
        }
        after = earlier;
      }
      add_team(dx, i, staging.dx);
      add_team(ddelta, i, staging.ddelta);
    }
    dA.add(dA_sum);
    dB.add(dB_sum);
    dC.add(dC_sum);
  }

  __device__ void run_block(int64_t batch, int64_t t, int steps, Quad* dB_of_steps,
                            Quad* dC_of_steps, bool is_first) {
    stage<true>(batch, t, steps);
    __syncthreads();
    const States before = h;
    advance<true>(steps);
    __syncthreads();
    if (dC_of_steps != nullptr) {
      // dC = h̄ dy, of complex numbers 2 h̄ dy
      const Real re = kParts, im = kComplex ? -re : re;
      add_channels(2, {re, im, re, im}, steps, dC_of_steps, is_first);
      __syncthreads();
    }
    reverse(steps, before);
    __syncthreads();
    if (dB_of_steps != nullptr) add_channels(1, {1, 1, 1, 1}, steps, dB_of_steps, is_first);
    finish(batch, t, steps);
    __syncthreads();
    if (threadIdx.x >= s.tile_d) return;
    Real dD_sum = 0, ddelta_sum = 0;
    for (int i = 0; i < steps; ++i) {
      dD_sum += staging.y[team_of(threadIdx.x, i)];
      ddelta_sum += staging.ddelta[team_of(threadIdx.x, i)];
    }
    dD += dD_sum;
    ddelta_bias += ddelta_sum;
  }

  // What is kept of every step, weighed by number `weight` of the channels' inputs, summed over
  // the channels and multiplied by `factor`.
  __device__ void add_channels(int weight, const Quad& factor, int steps, Quad* to,
                               bool is_first) const {
    for (int e = threadIdx.x; e < steps * s.lanes; e += kThreads) {
      const int i = e >> (__ffs(s.lanes) - 1), quad = e & (s.lanes - 1);
      if (quad >= s.quads) continue;
      Quad sum{};
#pragma unroll 4
      for (int d = 0; d < s.tile_d; ++d) {
        const Quad from = load_vector<kQuad>(kept(i, d * s.lanes + quad));
        const Real by = staging.inputs[i * staging.stride_d + d].value[weight];
#pragma unroll
        for (int j = 0; j < kQuad; ++j) sum.value[j] += by * from.value[j];
      }
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        sum.value[j] *= factor.value[j];
        if (!is_first) sum.value[j] += to[i * s.quads + quad].value[j];
      }
      to[i * s.quads + quad] = sum;
    }
  }

  // From what the states have left: du, ddelta, dz, and in the places of y and ddelta what is to be
  // summed up to dD and ddelta_bias.
  __device__ void finish(int64_t batch, int64_t t, int steps) const {
    const Plane<const T> u = plane_of<const T>(fwd.u, batch, place.head);
    const Plane<const T> delta = plane_of<const T>(fwd.delta, batch, place.head);
    const Plane<const T> dout = plane_of<const T>(p.dout, batch, place.head);
    const Plane<const T> z = plane_of<const T>(fwd.z, batch, place.head);
    const Plane<T> to_du = plane_of<T>(p.du, batch, place.head);
    const Plane<T> to_ddelta = plane_of<T>(p.ddelta, batch, place.head);
    const Plane<T> to_dz = plane_of<T>(p.dz, batch, place.head);
    struct Inputs {
      T u, delta, dout, z;
    };
    for_each_element<kThreads, 1>(
        s.tile_d, s.block_l, steps, u.stride_t < u.stride_i,
        [&](int d, int i) {
          Inputs inputs{};
          if (d >= place.channels) return inputs;
          inputs.u = u.at(place.first_d + d, t + i);
          if (fwd.delta_softplus) inputs.delta = delta.at(place.first_d + d, t + i);
          if (to_dz.data != nullptr) inputs.dout = dout.at(place.first_d + d, t + i);
          if (to_dz.data != nullptr) inputs.z = z.at(place.first_d + d, t + i);
          return inputs;
        },
        [&](int d, int i, const Inputs& inputs) {
          if (d >= place.channels) return;
          const Quad& staged = staging.inputs[i * staging.stride_d + d];
          const Real u_i = to_real(inputs.u), D = parameter(fwd.D, d), dy = staged.value[2];
          const Real dx = total(staging.dx, d, i);
          Real ddelta = u_i * dx + total(staging.ddelta, d, i);
          if (fwd.delta_softplus) {
            const Real raw = to_real(inputs.delta) + parameter(fwd.delta_bias, d);
            if (!(raw > 20)) ddelta *= sigmoid(raw);
          }
          if (to_dz.data != nullptr) {
            const Real z_i = to_real(inputs.z), open = sigmoid(z_i);
            const Real slope = open * (1 + z_i * (1 - open));
            put(to_dz.at(place.first_d + d, t + i),
                to_real(inputs.dout) * slope * (total(staging.y, d, i) + D * u_i), p.dz.accumulate);
          }
          if (to_du.data != nullptr)
            put(to_du.at(place.first_d + d, t + i), staged.value[0] * dx + D * dy, p.du.accumulate);
          if (to_ddelta.data != nullptr)
            put(to_ddelta.at(place.first_d + d, t + i), ddelta, p.ddelta.accumulate);
          staging.y[team_of(d, i)] = dy * u_i;
          staging.ddelta[team_of(d, i)] = ddelta;
        });
  }

  const SelectiveScanBwdParams& p;
  const SelectiveScanFwdParams& fwd;
  const Shape& s;
  const GeneralBwdMemory<Real>& memory;
  const TileStaging<Real>& staging;
  const Place place;
  const int64_t index, group;  // of the tile among all, and of its head's B and C
  Rate rate[kN];
  States A, h, dh;
  States dA{}, dB{}, dC{};       // of constant B and C
  Real dD = 0, ddelta_bias = 0;  // of the channel that the thread's number is
};

}  // namespace ssmcore::cuda
