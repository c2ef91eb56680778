// The selective scan with real A and varying B and C.
//
// A block takes kBlockD channels of one row. Its time is cut into tiles of kBlockL steps, which
// pass through three stages, a barrier apart:
//
//   1. kStagingThreads threads load a tile, and leave Δ, Δu, B and C in shared memory as floats.
//   2. kScanThreads threads run the recurrence, serially in time. A channel's states are spread
//      over kLanes neighbouring threads, kStates each; a thread has kChannels channels, so that
//      what it reads of B and C serves several. What each lane adds to y replaces Δu, Δ, …
//   3. The staging threads sum what the lanes left, add D u, gate with z and store the tile.
//
// Stages 1 and 3 of the tiles around it overlap with stage 2: they wait for memory, it does not.
// Shared memory holds rows of channels or states by steps, so four steps are read at once.
#pragma once

#include "../cpp/src/selective_scan_params.h"
#include "device/fault.cuh"
#include "device/math.cuh"
#include "device/scan_piece.cuh"

namespace ssmcore::cuda {

inline constexpr int kScanThreads = 128, kStagingThreads = 128;

// How a block shares its work; see above.
template <int channels, int states, int lanes, int block_l>
struct ScanShape {
  static constexpr int kChannels = channels, kStates = states, kLanes = lanes, kBlockL = block_l;
  static constexpr int kBlockD = kChannels * kScanThreads / kLanes;
  static constexpr int kDstate = kStates * kLanes;  // at most

  // Floats in shared memory. The odd number of fours in a row, and in the rows of a lane, keeps
  // neighbouring threads in different banks.
  static constexpr int kRow = kBlockL + 4;
  static constexpr int kChannelRows = kBlockD * (kLanes < 2 ? 2 : kLanes);
  static constexpr int kLaneRows = kStates * kRow + (kStates % 2 == 0 ? 4 : 0);
  static constexpr int kStage = kChannelRows * kRow + 2 * kLanes * kLaneRows;
  static constexpr int kFloats = 2 * kStage + 2 * kBlockD;
  static constexpr size_t kSharedBytes = sizeof(float) * kFloats;

  // Row `r` of Δ (part 0) and Δu (part 1) in a stage; then of what lane 0 (part 1), 1 (part 0), 2
  // (part 2), … adds to y.
  __device__ static float* cells(float* stage, int part, int r) {
    return stage + (part * kBlockD + r) * kRow;
  }
  __device__ static int part_of_lane(int lane) { return lane < 2 ? 1 - lane : lane; }
  // Rows of B (0) or C (1) of a lane: its states are lane, lane + kLanes, …
  __device__ static float* coefficients(float* stage, int which, int lane) {
    return stage + kChannelRows * kRow + (which * kLanes + lane) * kLaneRows;
  }
};

namespace {

// Steps that are staged together; none reaches over the end of a chunk.
struct Tile {
  int64_t begin = 0, chunk_end = 0;
  int steps = 0;
};

// `condition ? a : b` of values: of objects it would be an address, and they in memory.
__device__ __forceinline__ Tile select(bool condition, const Tile& a, const Tile& b) {
  return {condition ? a.begin : b.begin, condition ? a.chunk_end : b.chunk_end,
          condition ? a.steps : b.steps};
}
template <typename T>
__device__ __forceinline__ Plane<T> select(bool condition, const Plane<T>& a, const Plane<T>& b) {
  return {condition ? a.data : b.data, condition ? a.stride_row : b.stride_row,
          condition ? a.stride_t : b.stride_t, condition ? a.vectors : b.vectors};
}

struct Four {
  float value[4];
};

__device__ __forceinline__ Four load_four(const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  return {v.x, v.y, v.z, v.w};
}

__device__ __forceinline__ void store_four(float* to, const Four& four) {
  *reinterpret_cast<float4*>(to) =
      make_float4(four.value[0], four.value[1], four.value[2], four.value[3]);
}

// A row, of a batch or packed, and where it is found.
struct Row {
  int64_t index, batch, begin, length, slot;
};

// What a block works on.
struct Block {
  const SelectiveScanFwdParams& p;
  Row row;
  int64_t head, first_d;
  int channels;
  bool along_steps;  // how its pieces lie

  __device__ int64_t chunk_size() const {
    return p.chunk_states.data ? p.chunk_size : row.length;
  }
  template <int kBlockL>
  __device__ Tile tile_at(int64_t begin, int64_t chunk_end) const {
    if (begin == chunk_end) chunk_end = min(begin + chunk_size(), row.length);
    return {begin, chunk_end, static_cast<int>(min(int64_t{kBlockL}, chunk_end - begin))};
  }
  template <int kBlockL>
  __device__ Tile tile_after(const Tile& tile) const {
    return tile_at<kBlockL>(tile.begin + tile.steps, tile.chunk_end);
  }

  // The channel that row `r` of a stage holds. Those of a pair are half the rows apart.
  template <int kBlockD>
  __device__ int channel_of(int r) const {
    return along_steps ? r : 2 * (r % (kBlockD / 2)) + r / (kBlockD / 2);
  }

  template <bool kAlongSteps, typename T>
  __device__ Plane<T> plane(const Strided<4>& operand, int64_t at1, int64_t at2) const {
    Plane<T> plane{static_cast<T*>(operand.data) + row.batch * operand.stride[0] +
                       at1 * operand.stride[1] + at2 * operand.stride[2] +
                       row.begin * operand.stride[3],
                   operand.stride[2], operand.stride[3], false};
    plane.vectors = vectors_fit<kAlongSteps>(plane, !p.chunk_states.data || p.chunk_size % 8 == 0);
    return plane;
  }
};

__device__ __forceinline__ float float_at(const Strided<2>& operand, int64_t head, int64_t d) {
  return static_cast<const float*>(
      operand.data)[head * operand.stride[0] + d * operand.stride[1]];
}

// --- Staging --------------------------------------------------------------------------------------

template <typename T, typename Shape, bool kAlongSteps>
struct Staging {
  using Piece = cuda::Piece<T, kAlongSteps>;
  static constexpr int kPieces = Shape::kBlockD * Shape::kBlockL / 8;
  // Of B and C together.
  static constexpr int kCoefficients = 2 * Shape::kDstate * Shape::kBlockL / 8;
  static constexpr int kOwnCoefficients = (kCoefficients - 1) / kStagingThreads + 1;

  const Block& block;
  const SelectiveScanFwdParams& p;
  float* shared;
  const float *bias, *D;  // in shared memory
  const int thread;
  Plane<const T> u, delta, z, B, C;
  Plane<T> out;

  __device__ Staging(const Block& block, float* shared, int thread)
      : block(block),
        p(block.p),
        shared(shared),
        bias(shared + 2 * Shape::kStage),
        D(bias + Shape::kBlockD),
        thread(thread) {
    const int64_t group = block.head / (p.nheads / p.ngroups);
    u = block.plane<kAlongSteps, const T>(p.u, block.head, block.first_d);
    delta = block.plane<kAlongSteps, const T>(p.delta, block.head, block.first_d);
    if (p.z.data) z = block.plane<kAlongSteps, const T>(p.z, block.head, block.first_d);
    out = block.plane<kAlongSteps, T>(p.out, block.head, block.first_d);
    B = block.plane<kAlongSteps, const T>(p.B, group, 0);
    C = block.plane<kAlongSteps, const T>(p.C, group, 0);
  }

  // A piece's first channel and step, its first row, and from there to its second four.
  struct Place {
    int d, t, r, next_d, next_t, next_r;
  };
  __device__ static Place place(int piece) {
    constexpr int kPerRow = Shape::kBlockL / 8, kHalf = Shape::kBlockD / 2;
    if (kAlongSteps) return {piece / kPerRow, piece % kPerRow * 8, piece / kPerRow, 0, 4, 0};
    return {piece % kHalf * 2, piece / kHalf * 4, piece % kHalf, 1, 0, kHalf};
  }

  __device__ __forceinline__ void load(const Plane<const T>& plane, const Tile& tile, int piece,
                       Piece& loaded) const {
    const Place at = place(piece);
    load_piece(plane, at.d, tile.begin + at.t, block.channels - at.d, tile.steps - at.t, loaded);
  }

  // Pieces are loaded one ahead of their use: the first of a tile while the tile before is scanned.
  __device__ __forceinline__ void run() {
    Tile before, finished, staged, next = block.tile_at<Shape::kBlockL>(0, 0);
    Piece staged_u, staged_delta, finished_u, finished_z, coefficients[kOwnCoefficients];
    load(u, next, thread, staged_u);
    load(delta, next, thread, staged_delta);
    load_coefficients(next, coefficients);
    float* stage = shared;
    for (bool odd = false;; odd = !odd) {
      before = finished;
      finished = staged;
      staged = next;
      if (staged.steps + finished.steps + before.steps == 0) break;
      next = block.tile_after<Shape::kBlockL>(staged);
      stage = shared + (odd ? Shape::kStage : 0);
      for (int piece = thread; piece < kPieces; piece += kStagingThreads) {
        const bool last = piece + kStagingThreads >= kPieces;
        const int next_piece = last ? thread : piece + kStagingThreads;
        if (before.steps > 0) finish(stage, before, piece, finished_u, finished_z);
        const Tile to_finish = select(last, finished, before);
        if (to_finish.steps > 0) {
          load(u, to_finish, next_piece, finished_u);
          if (p.z.data) load(z, to_finish, next_piece, finished_z);
        }
        if (staged.steps > 0) {
          convert(stage, staged, piece, staged_u, staged_delta);
          load(u, select(last, next, staged), next_piece, staged_u);
          load(delta, select(last, next, staged), next_piece, staged_delta);
        }
      }
      if (staged.steps > 0) {
        stage_coefficients(stage, coefficients);
        load_coefficients(next, coefficients);
      }
      if (staged.steps + finished.steps > 0) __syncthreads();
    }
  }

  __device__ __forceinline__ void convert(float* stage, const Tile& tile, int piece, const Piece& piece_u,
                          const Piece& piece_delta) const {
    const Place at = place(piece);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.r + half * at.next_r, t = at.t + half * at.next_t;
      const float bias_d = bias[at.d + half * at.next_d];
      Four dt, dt_u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = piece_delta.get(half, i) + bias_d;
        dt.value[i] = p.delta_softplus ? softplus(x) : x;
      }
      if (tile.steps < Shape::kBlockL) {
#pragma unroll
        for (int i = 0; i < 4; ++i)  // such steps leave the states as they are
          if (t + i >= tile.steps) dt.value[i] = 0;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        dt_u.value[i] = dt.value[i] * piece_u.get(half, i);
      store_four(Shape::cells(stage, 0, r) + t, dt);
      store_four(Shape::cells(stage, 1, r) + t, dt_u);
    }
  }

  __device__ __forceinline__ void finish(float* stage, const Tile& tile, int piece, const Piece& piece_u,
                         const Piece& piece_z) const {
    const Place at = place(piece);
    float value[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.r + half * at.next_r, t = at.t + half * at.next_t;
      const float D_d = D[at.d + half * at.next_d];
      Four y = load_four(Shape::cells(stage, 1, r) + t);
#pragma unroll
      for (int lane = 1; lane < Shape::kLanes; ++lane) {
        const Four more = load_four(Shape::cells(stage, Shape::part_of_lane(lane), r) + t);
#pragma unroll
        for (int i = 0; i < 4; ++i) y.value[i] += more.value[i];
      }
      if (p.D.data) {
#pragma unroll
        for (int i = 0; i < 4; ++i) y.value[i] += D_d * piece_u.get(half, i);
      }
      if (p.z.data) {
#pragma unroll
        for (int i = 0; i < 4; ++i) y.value[i] *= silu(piece_z.get(half, i));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) value[Piece::index(half, i)] = y.value[i];
    }
    Piece piece_out;
    piece_out.set(value);
    store_piece(out, at.d, tile.begin + at.t, block.channels - at.d, tile.steps - at.t, piece_out);
  }

  // Where a piece of B or C is from, (dstate, steps), and which of them it is.
  struct CoefficientPlace {
    int which, n, t;
  };
  __device__ CoefficientPlace coefficient_place(int own) const {
    constexpr int kPerRow = Shape::kBlockL / 8, kPairs = Shape::kDstate / 2;
    const int at = thread + own * kStagingThreads, piece = at % (kCoefficients / 2);
    if (kAlongSteps) return {at / (kCoefficients / 2), piece / kPerRow, piece % kPerRow * 8};
    return {at / (kCoefficients / 2), piece % kPairs * 2, piece / kPairs * 4};
  }

  // 0 for states there are not.
  __device__ __forceinline__ void load_coefficients(const Tile& tile, Piece (&pieces)[kOwnCoefficients]) const {
#pragma unroll
    for (int own = 0; own < kOwnCoefficients; ++own) {
      const CoefficientPlace at = coefficient_place(own);
      if (at.which < 2)
        load_piece(select(at.which == 0, B, C), at.n, tile.begin + at.t,
                   static_cast<int>(p.dstate) - at.n, tile.steps - at.t, pieces[own]);
    }
  }

  __device__ __forceinline__ void stage_coefficients(float* stage, const Piece (&pieces)[kOwnCoefficients]) const {
#pragma unroll
    for (int own = 0; own < kOwnCoefficients; ++own) {
      const CoefficientPlace at = coefficient_place(own);
      if (at.which > 1) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = at.n + (kAlongSteps ? 0 : half), t = at.t + (kAlongSteps ? 4 * half : 0);
        store_four(Shape::coefficients(stage, at.which, n % Shape::kLanes) +
                       n / Shape::kLanes * Shape::kRow + t,
                   {pieces[own].get(half, 0), pieces[own].get(half, 1), pieces[own].get(half, 2),
                    pieces[own].get(half, 3)});
      }
    }
  }
};

// --- Recurrence -----------------------------------------------------------------------------------

template <typename Shape, int kPolynomials>
struct Recurrence {
  static constexpr int kChannels = Shape::kChannels, kStates = Shape::kStates;

  const Block& block;
  const SelectiveScanFwdParams& p;
  float* shared;
  const int lane, group;
  float A[kChannels][kStates], h[kChannels][kStates], delta_sum[kChannels], lost[kChannels];

  __device__ Recurrence(const Block& block, float* shared, int thread)
      : block(block),
        p(block.p),
        shared(shared),
        lane(thread % Shape::kLanes),
        group(thread / Shape::kLanes) {}

  __device__ int row(int k) const { return group + k * (Shape::kBlockD / kChannels); }

  // Calls body(d, n, k, s) for the channels and states of this thread that exist.
  template <typename Body>
  __device__ __forceinline__ void for_each_state(const Body& body) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int d = block.channel_of<Shape::kBlockD>(row(k));
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        const int n = lane + s * Shape::kLanes;
        if (d < block.channels && n < p.dstate) body(block.first_d + d, n, k, s);
      }
    }
  }

  __device__ __forceinline__ void store_states(float* to, int64_t stride_d, int64_t stride_n) const {
    for_each_state(
        [&](int64_t d, int n, int k, int s) { to[d * stride_d + n * stride_n] = h[k][s]; });
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      delta_sum[k] = lost[k] = 0;
#pragma unroll
      for (int s = 0; s < kStates; ++s) A[k][s] = h[k][s] = 0;
    }
    const float* from = static_cast<const float*>(p.A.data) + block.head * p.A.stride[0];
    for_each_state([&](int64_t d, int n, int k, int s) {
      A[k][s] = from[d * p.A.stride[1] + n * p.A.stride[2]] * kLog2e;
    });
    if (!p.initial_state.data || block.row.slot < 0) return;
    from = static_cast<const float*>(p.initial_state.data) +
           block.row.slot * p.initial_state.stride[0] + block.head * p.initial_state.stride[1];
    for_each_state([&](int64_t d, int n, int k, int s) {
      h[k][s] = from[d * p.initial_state.stride[2] + n * p.initial_state.stride[3]];
    });
  }

  __device__ __forceinline__ void run() {
    load();
    int64_t chunk = 0;
    float* stage = shared;
    Tile tile = block.tile_at<Shape::kBlockL>(0, 0);
    if (tile.steps > 0) __syncthreads();
    for (bool odd = false; tile.steps > 0; odd = !odd) {
      stage = shared + (odd ? Shape::kStage : 0);
      advance(stage, tile.steps);
      if (p.chunk_states.data && tile.begin + tile.steps == tile.chunk_end && chunk < p.chunks) {
        const Strided<5>& to = p.chunk_states;
        store_states(static_cast<float*>(to.data) + block.row.batch * to.stride[0] +
                         chunk * to.stride[1] + block.head * to.stride[2],
                     to.stride[3], to.stride[4]);
        ++chunk;
      }
      tile = block.tile_after<Shape::kBlockL>(tile);
      __syncthreads();
    }
    if (p.last_state.data && block.row.slot >= 0) {
      const Strided<4>& to = p.last_state;
      store_states(static_cast<float*>(to.data) + block.row.slot * to.stride[0] +
                       block.head * to.stride[1],
                   to.stride[2], to.stride[3]);
    }
    if (p.delta_sum.data && lane == 0) {
      const Strided<3>& to = p.delta_sum;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const int d = block.channel_of<Shape::kBlockD>(row(k));
        if (d < block.channels)
          static_cast<float*>(to.data)[block.row.index * to.stride[0] + block.head * to.stride[1] +
                                       (block.first_d + d) * to.stride[2]] = delta_sum[k];
      }
    }
  }

  // What four steps need.
  struct Steps {
    Four dt[kChannels], dt_u[kChannels];
  };
  __device__ __forceinline__ void load_steps(float* stage, int t, Steps& steps) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      steps.dt[k] = load_four(Shape::cells(stage, 0, row(k)) + t);
      steps.dt_u[k] = load_four(Shape::cells(stage, 1, row(k)) + t);
    }
  }

  __device__ __forceinline__ void advance(float* stage, int steps) {
    const float* B = Shape::coefficients(stage, 0, lane);
    const float* C = Shape::coefficients(stage, 1, lane);
    Steps now, next;
    load_steps(stage, 0, next);
    constexpr bool kAhead = kStates <= 2;  // B and C, too, are read ahead
    Four B_ahead[kAhead ? kStates : 1], C_ahead[kAhead ? kStates : 1];
    if (kAhead) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        B_ahead[s] = load_four(B + s * Shape::kRow);
        C_ahead[s] = load_four(C + s * Shape::kRow);
      }
    }
#pragma unroll(kChannels * kStates <= 4 ? 4 : 1)
    for (int t = 0; t < steps; t += 4) {
      now = next;
      load_steps(stage, t + 4, next);  // after the last: the unused end of the row
      Four y[kChannels] = {};
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        Four B_s, C_s;
        if (kAhead) {
          B_s = B_ahead[s];
          C_s = C_ahead[s];
          B_ahead[s] = load_four(B + s * Shape::kRow + t + 4);
          C_ahead[s] = load_four(C + s * Shape::kRow + t + 4);
        } else {
          B_s = load_four(B + s * Shape::kRow + t);
          C_s = load_four(C + s * Shape::kRow + t);
        }
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float x = now.dt[k].value[i] * A[k][s];
            const float a = s % 8 >= 8 - kPolynomials ? exp2_polynomial(x) : exp2_approx(x);
            h[k][s] = a * h[k][s] + now.dt_u[k].value[i] * B_s.value[i];
            y[k].value[i] += C_s.value[i] * h[k][s];
          }
      }
      if (p.delta_sum.data) add_deltas(now.dt);
      if (Shape::kLanes > 1) __syncwarp();  // all lanes have read what is now overwritten
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        store_four(Shape::cells(stage, Shape::part_of_lane(lane), row(k)) + t, y[k]);
    }
  }

  // Kahan's summation: a million tiles lose no more than one.
  __device__ __forceinline__ void add_deltas(const Four (&dt)[kChannels]) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const float* d = dt[k].value;
      const float added = ((d[0] + d[1]) + (d[2] + d[3])) - lost[k], after = delta_sum[k] + added;
      lost[k] = (after - delta_sum[k]) - added;
      delta_sum[k] = after;
    }
  }
};

// --- Kernel ---------------------------------------------------------------------------------------

__device__ inline Row row_at(const SelectiveScanFwdParams& p, int64_t index, uint32_t* faults) {
  Row row{index, index, 0, p.seqlen, index};
  if (p.cu_seqlens.data) {
    const int* cu_seqlens = static_cast<const int*>(p.cu_seqlens.data);
    const int64_t begin = cu_seqlens[index * p.cu_seqlens.stride[0]];
    const int64_t end = cu_seqlens[(index + 1) * p.cu_seqlens.stride[0]];
    const bool fits = 0 <= begin && begin <= end && end <= p.seqlen && (index > 0 || begin == 0) &&
                      (index + 1 < p.rows || end == p.seqlen);
    if (!fits) report(faults, Fault::selective_scan_cu_seqlens);
    row.batch = 0;
    row.begin = fits ? begin : 0;
    row.length = fits ? end - begin : 0;
  }
  if (p.state_indices.data) {
    row.slot = static_cast<const int*>(p.state_indices.data)[index * p.state_indices.stride[0]];
    if (row.slot >= p.slots) {
      report(faults, Fault::selective_scan_state_indices);
      row.slot = -1;
    }
  }
  return row;
}

template <typename T, typename Shape, int kPolynomials>
__global__ void __launch_bounds__(kScanThreads + kStagingThreads,
                                  Shape::kChannels* Shape::kStates > 16 ? 1 : 2)
    selective_scan_fwd_kernel(const __grid_constant__ SelectiveScanFwdParams p, uint32_t* faults) {
  extern __shared__ __align__(16) float shared[];
  const int64_t blocks_per_head = (p.headdim + Shape::kBlockD - 1) / Shape::kBlockD;
  const int64_t at = blockIdx.x / blocks_per_head;
  const int64_t first_d = blockIdx.x % blocks_per_head * Shape::kBlockD;
  const Block block{p,
                    row_at(p, at / p.nheads, faults),
                    at % p.nheads,
                    first_d,
                    static_cast<int>(min(int64_t{Shape::kBlockD}, p.headdim - first_d)),
                    p.u.stride[2] != 1 || p.u.stride[3] == 1};
  float* bias = shared + 2 * Shape::kStage;
  float* D = bias + Shape::kBlockD;
  for (int d = threadIdx.x; d < Shape::kBlockD; d += kScanThreads + kStagingThreads) {
    const bool exists = d < block.channels;
    bias[d] = exists && p.delta_bias.data ? float_at(p.delta_bias, block.head, first_d + d) : 0;
    D[d] = exists && p.D.data ? float_at(p.D, block.head, first_d + d) : 0;
  }
  __syncthreads();
  if (threadIdx.x < kScanThreads)
    Recurrence<Shape, kPolynomials>(block, shared, threadIdx.x).run();
  else if (block.along_steps)
    Staging<T, Shape, true>(block, shared, threadIdx.x - kScanThreads).run();
  else
    Staging<T, Shape, false>(block, shared, threadIdx.x - kScanThreads).run();
}

}  // namespace
}  // namespace ssmcore::cuda
