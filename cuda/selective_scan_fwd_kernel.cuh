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
#include "device/math.cuh"
#include "device/scan_piece.cuh"
#include "scan_row.cuh"

namespace ssmcore::cuda {

inline constexpr int kScanThreads = 128;

// How a block shares its work; see above.
template <int channels, int states, int lanes, int block_l, int staging_threads,
          int min_blocks>
struct ScanShape {
  static constexpr int kChannels = channels, kStates = states, kLanes = lanes, kBlockL = block_l;
  static constexpr int kStagingThreads = staging_threads, kMinBlocks = min_blocks;
  static constexpr int kThreads = kScanThreads + kStagingThreads;
  static constexpr int kBlockD = kChannels * kScanThreads / kLanes;
  static constexpr int kDstate = kStates * kLanes;  // at most

  // Floats in shared memory. The paddings keep threads that read fours together in different banks.
  static constexpr int kRow = kBlockL + 4;
  static constexpr int kParts = kLanes <= 2 ? 2 : kLanes + 2;
  static constexpr int kChannelRows = kParts * kRow + 4;
  static constexpr int kLaneRows = kStates * kRow + (kStates % 2 == 0 ? 4 : 0);
  static constexpr int kStage = kBlockD * kChannelRows + 2 * kLanes * kLaneRows;

  // Row `r` of Δ (part 0) and Δu (part 1) in a stage, and of what each lane adds to y: in the place
  // of these, or after them.
  __device__ static float* cells(float* stage, int part, int r) {
    return stage + r * kChannelRows + part * kRow;
  }
  static constexpr bool kInPlace = kLanes <= 2;
  __device__ static int part_of_lane(int lane) { return kInPlace ? 1 - lane : 2 + lane; }
  // Rows of B (0) or C (1) of a lane: its states are lane, lane + kLanes, …
  __device__ static float* coefficients(float* stage, int which, int lane) {
    return stage + kBlockD * kChannelRows + (which * kLanes + lane) * kLaneRows;
  }
};

namespace {

// Cuts a row into tiles, none of which reaches over the end of a chunk.
struct Tiles {
  int64_t row_left, chunk_left, chunk_size;

  // Steps of the next tile; 0 after the last.
  template <int kBlockL>
  __device__ __forceinline__ int next() {
    if (chunk_left == 0) chunk_left = min(chunk_size, row_left);
    const int steps = static_cast<int>(min(int64_t{kBlockL}, chunk_left));
    chunk_left -= steps;
    row_left -= steps;
    return steps;
  }
};

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

// What a block works on.
struct Block {
  const SelectiveScanFwdParams& p;
  int64_t row_index;
  ScanRow row;
  int64_t head, first_d;
  int channels;
  bool along_steps;  // how its pieces lie

  __device__ Tiles tiles() const {
    const int64_t length = row.end - row.begin;
    return {length, 0, p.chunk_states.data ? p.chunk_size : length};
  }

  // The channel that row `r` of a stage holds. Those of a pair are half the rows apart.
  template <int kBlockD>
  __device__ int channel_of(int r) const {
    return along_steps ? r : 2 * (r % (kBlockD / 2)) + r / (kBlockD / 2);
  }

  // At row `r` and step t of an operand (batch, .., rows, steps).
  template <typename Cursor>
  __device__ Cursor cursor(const Strided<4>& operand, int64_t at, int64_t r, int64_t t) const {
    using T = std::remove_pointer_t<decltype(Cursor::at)>;
    return {static_cast<T*>(operand.data) + row.batch * operand.stride[0] +
                at * operand.stride[1] + r * operand.stride[2] +
                (row.begin + t) * operand.stride[3],
            operand.stride[2], operand.stride[3]};
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
  using Input = Cursor<const T, kAlongSteps>;
  using Output = Cursor<T, kAlongSteps>;
  static constexpr int kBlockL = Shape::kBlockL, kThreads = Shape::kStagingThreads;

  // Pieces across the rows and along the steps of a tile; from one piece of a thread to its next.
  template <int kRows>
  struct Cut {
    static constexpr int kAcross = kRows / Piece::kRows, kAlong = kBlockL / Piece::kSteps;
    static constexpr int kOwn = (kAcross * kAlong + kThreads - 1) / kThreads;
    static constexpr int kNextRow = kAlongSteps ? kThreads / kAlong : 0;
    static constexpr int kNextStep = kAlongSteps ? 0 : kThreads / kAcross * Piece::kSteps;
    // Eight neighbouring threads have eight rows, whose fours lie in different banks.
    __device__ static int row(int thread) {
      return kAlongSteps ? thread / (8 * kAlong) * 8 + thread % 8 : thread % kAcross * 2;
    }
    __device__ static int step(int thread) {
      return (kAlongSteps ? thread / 8 % kAlong : thread / kAcross) * Piece::kSteps;
    }
  };
  using Channels = Cut<Shape::kBlockD>;
  using States = Cut<2 * Shape::kDstate>;  // of B, then of C
  static_assert(Channels::kAcross * Channels::kAlong % kThreads == 0);

  const Block& block;
  const SelectiveScanFwdParams& p;
  float* const shared;
  uint32_t* const slots;  // this thread's
  const int d, t;         // of the first piece
  const int n, t_n;       // of the first piece of B or C
  bool is_fast, is_fast_n;
  float bias[kAlongSteps ? Channels::kOwn : 2], D[kAlongSteps ? Channels::kOwn : 2];
  Input u, delta, z, B, C;
  Output out;

  __device__ Staging(const Block& block, float* shared, int thread)
      : block(block),
        p(block.p),
        shared(shared),
        slots(reinterpret_cast<uint32_t*>(shared + 2 * Shape::kStage) + 4 * thread),
        d(Channels::row(thread)),
        t(Channels::step(thread)),
        n(States::row(thread)),
        t_n(States::step(thread)) {
    const int64_t group = block.head / (p.nheads / p.ngroups), first_d = block.first_d + d;
    u = block.cursor<Input>(p.u, block.head, first_d, t);
    delta = block.cursor<Input>(p.delta, block.head, first_d, t);
    z = block.cursor<Input>(p.z, block.head, first_d, t);
    out = block.cursor<Output>(p.out, block.head, first_d, t);
    B = block.cursor<Input>(p.B, group, n, t_n);
    C = block.cursor<Input>(p.C, group, n - Shape::kDstate, t_n);
    const bool begins_aligned = !kAlongSteps || !p.chunk_states.data || p.chunk_size % 8 == 0;
    constexpr int kRowsUsed = (Channels::kOwn - 1) * Channels::kNextRow + Piece::kRows;
    is_fast = begins_aligned && d + kRowsUsed <= block.channels && u.is_aligned() &&
              delta.is_aligned() && (!p.z.data || z.is_aligned()) && out.is_aligned();
    is_fast_n = begins_aligned && p.dstate == Shape::kDstate && B.is_aligned() && C.is_aligned();
#pragma unroll
    for (int i = 0; i < (kAlongSteps ? Channels::kOwn : 2); ++i) {
      const int at = d + (kAlongSteps ? i * Channels::kNextRow : i);
      const bool exists = at < block.channels;
      bias[i] = exists && p.delta_bias.data
                    ? float_at(p.delta_bias, block.head, block.first_d + at)
                    : 0.0f;
      D[i] = exists && p.D.data ? float_at(p.D, block.head, block.first_d + at) : 0.0f;
    }
  }

  // Copies wait in shared memory, after the stages, from the iteration before a tile is staged
  // until it is finished; those of B and C until they are staged. Only the thread that copies a
  // piece reads it.
  static constexpr int kTilesKept = 4, kCoefficientTilesKept = 2;
  using Slot = cuda::Slot<Piece, kThreads>;
  enum Operand { kU, kDelta, kZ, kOperands };
  static constexpr size_t kSlotBytes =
      sizeof(uint32_t) * Slot::kWords *
      (kTilesKept * kOperands * Channels::kOwn + kCoefficientTilesKept * States::kOwn);

  __device__ __forceinline__ Slot slot(int tile, Operand operand, int i) const {
    const int index = (tile % kTilesKept * kOperands + operand) * Channels::kOwn + i;
    return {slots + index * Slot::kWords};
  }
  __device__ __forceinline__ Slot coefficient_slot(int tile, int i) const {
    const int index = kTilesKept * kOperands * Channels::kOwn +
                      tile % kCoefficientTilesKept * States::kOwn + i;
    return {slots + index * Slot::kWords};
  }

  __device__ __forceinline__ void copy(const Input& input, int steps, int tile,
                                       Operand operand) const {
#pragma unroll
    for (int i = 0; i < Channels::kOwn; ++i) {
      const int rows = i * Channels::kNextRow, at = i * Channels::kNextStep;
      if (is_fast && steps == kBlockL)
        input.copy(rows, at, slot(tile, operand, i));
      else
        slot(tile, operand, i)
            .store(Input::load_some(input, rows, at, block.channels - d - rows, steps - t - at));
    }
  }

  // 0 for states there are not.
  __device__ __forceinline__ void copy_coefficients(int steps, int tile) const {
#pragma unroll
    for (int i = 0; i < States::kOwn; ++i) {
      const int rows = i * States::kNextRow, at = i * States::kNextStep;
      if (n + rows >= 2 * Shape::kDstate || t_n + at >= kBlockL) continue;
      const bool is_C = n + rows >= Shape::kDstate;
      const Input from{is_C ? C.at : B.at, is_C ? C.stride_row : B.stride_row,
                       is_C ? C.stride_t : B.stride_t};
      if (is_fast_n && steps == kBlockL)
        from.copy(rows, at, coefficient_slot(tile, i));
      else
        coefficient_slot(tile, i).store(Input::load_some(
            from, rows, at, static_cast<int>(p.dstate) - (n + rows) % Shape::kDstate,
            steps - t_n - at));
    }
  }

  // Begins to copy tile number `tile`, of `steps`.
  __device__ __forceinline__ void begin(int steps, int tile) {
    if (steps > 0) {
      copy(u, steps, tile, kU);
      copy(delta, steps, tile, kDelta);
      if (p.z.data) copy(z, steps, tile, kZ);
      copy_coefficients(steps, tile);
      u.advance(steps);
      delta.advance(steps);
      z.advance(steps);
      B.advance(steps);
      C.advance(steps);
    }
    commit_copies();
  }

  __device__ __forceinline__ void run() {
    Tiles tiles = block.tiles();
    int before = 0, finished = 0, staged = 0, next = tiles.next<kBlockL>();
    begin(next, 0);
    for (int tile = 0;; tile = (tile + 1) % kTilesKept) {
      before = finished;
      finished = staged;
      staged = next;
      if (staged + finished + before == 0) break;
      next = tiles.next<kBlockL>();
      begin(next, tile + 1);
      float* stage = shared + tile % 2 * Shape::kStage;
      if (before > 0) {
        finish(stage, before, tile + 2);
        out.advance(before);
      }
      wait_for_copies<1>();
      if (staged > 0) {
        stage_coefficients(stage, tile);
        convert(stage, staged, tile);
      }
      if (staged + finished > 0) __syncthreads();
    }
  }

  // The row in a stage, and the step, of a four.
  __device__ static __forceinline__ int row_of(int d, int i, int four) {
    return kAlongSteps ? d + i * Channels::kNextRow : d / 2 + four * (Shape::kBlockD / 2);
  }
  __device__ static __forceinline__ int step_of(int t, int i, int four) {
    return t + i * Channels::kNextStep + (kAlongSteps ? 4 * four : 0);
  }

  __device__ __forceinline__ void convert(float* stage, int steps, int tile) const {
#pragma unroll
    for (int i = 0; i < Channels::kOwn; ++i) {
      const Piece u = slot(tile, kU, i).load(), delta = slot(tile, kDelta, i).load();
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const int at = step_of(t, i, four);
        float* cells = Shape::cells(stage, 0, row_of(d, i, four)) + at;
        Four dt, dt_u;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float x = delta.get(four, j) + bias[kAlongSteps ? i : four];
          dt.value[j] = p.delta_softplus ? softplus(x) : x;
        }
        if (steps < kBlockL) {
#pragma unroll
          for (int j = 0; j < 4; ++j)  // such steps leave the states as they are
            if (at + j >= steps) dt.value[j] = 0;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) dt_u.value[j] = dt.value[j] * u.get(four, j);
        store_four(cells, dt);
        store_four(cells + Shape::kRow, dt_u);
      }
    }
  }

  __device__ __forceinline__ void finish(float* stage, int steps, int tile) const {
#pragma unroll
    for (int i = 0; i < Channels::kOwn; ++i) {
      const Piece u = slot(tile, kU, i).load(), z = slot(tile, kZ, i).load();
      float value[8];
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const float* cells =
            Shape::cells(stage, 0, row_of(d, i, four)) + step_of(t, i, four);
        Four y = load_four(cells + Shape::part_of_lane(0) * Shape::kRow);
#pragma unroll
        for (int lane = 1; lane < Shape::kLanes; ++lane) {
          const Four more = load_four(cells + Shape::part_of_lane(lane) * Shape::kRow);
#pragma unroll
          for (int j = 0; j < 4; ++j) y.value[j] += more.value[j];
        }
        if (p.D.data) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            y.value[j] += D[kAlongSteps ? i : four] * u.get(four, j);
        }
        if (p.z.data) {
#pragma unroll
          for (int j = 0; j < 4; ++j) y.value[j] *= silu(z.get(four, j));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) value[Piece::index(four, j)] = y.value[j];
      }
      Piece piece;
      piece.set(value);
      const int rows = i * Channels::kNextRow, at = i * Channels::kNextStep;
      if (is_fast && steps == kBlockL)
        out.store(rows, at, piece);
      else
        Output::store_some(out, rows, at, block.channels - d - rows, steps - t - at, piece);
    }
  }

  __device__ __forceinline__ void stage_coefficients(float* stage, int tile) const {
#pragma unroll
    for (int i = 0; i < States::kOwn; ++i) {
      const int rows = i * States::kNextRow, at = t_n + i * States::kNextStep;
      if (n + rows >= 2 * Shape::kDstate || at >= kBlockL) continue;
      const Piece piece = coefficient_slot(tile, i).load();
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const int row = n + rows + Piece::row(four), state = row % Shape::kDstate;
        store_four(Shape::coefficients(stage, row / Shape::kDstate, state % Shape::kLanes) +
                       state / Shape::kLanes * Shape::kRow + at + Piece::step(four, 0),
                   {piece.get(four, 0), piece.get(four, 1), piece.get(four, 2),
                    piece.get(four, 3)});
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
    Tiles tiles = block.tiles();
    int steps = tiles.next<Shape::kBlockL>();
    if (steps > 0) __syncthreads();
    for (bool odd = false; steps > 0; odd = !odd) {
      float* stage = shared + (odd ? Shape::kStage : 0);
      if (p.delta_sum.data) add_deltas(stage, steps);
      advance(stage, steps);
      if (p.chunk_states.data && tiles.chunk_left == 0 && chunk < p.chunks) {
        const Strided<5>& to = p.chunk_states;
        store_states(static_cast<float*>(to.data) + block.row.batch * to.stride[0] +
                         chunk * to.stride[1] + block.head * to.stride[2],
                     to.stride[3], to.stride[4]);
        ++chunk;
      }
      steps = tiles.next<Shape::kBlockL>();
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
          static_cast<float*>(to.data)[block.row_index * to.stride[0] + block.head * to.stride[1] +
                                       (block.first_d + d) * to.stride[2]] = delta_sum[k];
      }
    }
  }

  // exp(Δ A) of one state and four steps, for every channel.
  struct Decays {
    Four of[kChannels];
  };
  __device__ __forceinline__ Decays decays(const Four (&dt)[kChannels], int s) const {
    Decays a;
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = dt[k].value[i] * A[k][s];
        a.of[k].value[i] = s % 8 >= 8 - kPolynomials ? exp2_polynomial(x) : exp2_approx(x);
      }
    return a;
  }

  __device__ __forceinline__ void load_rows(float* stage, int part, int t,
                                            Four (&rows)[kChannels]) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) rows[k] = load_four(Shape::cells(stage, part, row(k)) + t);
  }

  // Everything is begun before it is needed: loads four steps or kAhead states ahead, and decays
  // kAhead states. What is read beyond the tile is not used.
  __device__ __forceinline__ void advance(float* stage, int steps) {
    constexpr int kAhead = kStates < 2 ? 1 : 2;
    const float* B = Shape::coefficients(stage, 0, lane);
    const float* C = Shape::coefficients(stage, 1, lane);
    Four dt[kChannels], dt_next[kChannels], dt_u_next[kChannels], B_ahead[kAhead], C_ahead[kAhead];
    Decays a_ahead[kAhead];
    load_rows(stage, 0, 0, dt);
    load_rows(stage, 0, 4, dt_next);
    load_rows(stage, 1, 0, dt_u_next);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      a_ahead[s] = decays(dt, s);
      B_ahead[s] = load_four(B + s * Shape::kRow);
      C_ahead[s] = load_four(C + s * Shape::kRow);
    }
#pragma unroll(kChannels * kStates <= 4 ? 2 : 1)
    for (int t = 0; t < steps; t += 4) {
      Four dt_u[kChannels], dt_after[kChannels], y[kChannels] = {};
#pragma unroll
      for (int k = 0; k < kChannels; ++k) dt_u[k] = dt_u_next[k];
      load_rows(stage, 0, t + 8, dt_after);
      load_rows(stage, 1, t + 4, dt_u_next);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        const Decays a = a_ahead[s % kAhead];
        const Four B_s = B_ahead[s % kAhead], C_s = C_ahead[s % kAhead];
        const int ahead = (s + kAhead) % kStates;
        const bool wraps = s + kAhead >= kStates;
        a_ahead[s % kAhead] = decays(wraps ? dt_next : dt, ahead);
        B_ahead[s % kAhead] = load_four(B + ahead * Shape::kRow + t + (wraps ? 4 : 0));
        C_ahead[s % kAhead] = load_four(C + ahead * Shape::kRow + t + (wraps ? 4 : 0));
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            h[k][s] = a.of[k].value[i] * h[k][s] + dt_u[k].value[i] * B_s.value[i];
            y[k].value[i] += C_s.value[i] * h[k][s];
          }
      }
      if (Shape::kInPlace && Shape::kLanes > 1) __syncwarp();  // all lanes have read these cells
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        store_four(Shape::cells(stage, Shape::part_of_lane(lane), row(k)) + t, y[k]);
        dt[k] = dt_next[k];
        dt_next[k] = dt_after[k];
      }
    }
  }

  // Kahan's summation: a million tiles lose no more than one.
  __device__ __forceinline__ void add_deltas(float* stage, int steps) {
    for (int t = 0; t < steps; t += 4) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const Four dt = load_four(Shape::cells(stage, 0, row(k)) + t);
        const float sum = (dt.value[0] + dt.value[1]) + (dt.value[2] + dt.value[3]);
        const float added = sum - lost[k], after = delta_sum[k] + added;
        lost[k] = (after - delta_sum[k]) - added;
        delta_sum[k] = after;
      }
    }
    __syncwarp();  // before it is overwritten
  }
};

template <typename T, typename Shape>
constexpr size_t shared_bytes() {
  return 2 * sizeof(float) * Shape::kStage + Staging<T, Shape, true>::kSlotBytes;
}

// --- Kernel ---------------------------------------------------------------------------------------

template <typename T, typename Shape, int kPolynomials>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    selective_scan_fwd_kernel(const __grid_constant__ SelectiveScanFwdParams p, uint32_t* faults) {
  extern __shared__ __align__(16) float shared[];
  const int64_t blocks_per_head = (p.headdim + Shape::kBlockD - 1) / Shape::kBlockD;
  const int64_t at = blockIdx.x / blocks_per_head;
  const int64_t first_d = blockIdx.x % blocks_per_head * Shape::kBlockD;
  const Block block{p,
                    at / p.nheads,
                    scan_row(p, at / p.nheads, faults),
                    at % p.nheads,
                    first_d,
                    static_cast<int>(min(int64_t{Shape::kBlockD}, p.headdim - first_d)),
                    p.u.stride[2] != 1 || p.u.stride[3] == 1};
  if (threadIdx.x < kScanThreads)
    Recurrence<Shape, kPolynomials>(block, shared, threadIdx.x).run();
  else if (block.along_steps)
    Staging<T, Shape, true>(block, shared, threadIdx.x - kScanThreads).run();
  else
    Staging<T, Shape, false>(block, shared, threadIdx.x - kScanThreads).run();
}

}  // namespace
}  // namespace ssmcore::cuda
