// The first and the last stage of selective_scan_varying_fwd.cu: from operands in memory to Δ, Δu,
// B and C as floats in shared memory, and from what the recurrence left there to `out`.
#pragma once

#include "device/math.cuh"
#include "device/scan_piece.cuh"
#include "scan_shape.cuh"

namespace ssmcore::cuda {

// Without kOutputs: for the states only, from the last tile of a part to the first.
template <typename T, typename Shape, bool kAlongSteps, bool kOutputs>
struct ScanStaging {
  using Piece = cuda::Piece<T, kAlongSteps>;
  using Input = Cursor<const T, kAlongSteps>;
  using Output = Cursor<T, kAlongSteps>;
  static constexpr int kBlockL = Shape::kBlockL, kThreads = kStagingThreads;

  // How a tile is cut into pieces: a thread's are `thread`, thread + kThreads, … .
  template <int kRows>
  struct Cut {
    static constexpr int kAcross = kRows / Piece::kRows, kAlong = kBlockL / Piece::kSteps;
    static constexpr int kPieces = kAcross * kAlong, kOwn = (kPieces + kThreads - 1) / kThreads;
    static_assert(kPieces < kThreads || kPieces % kThreads == 0);

    // Eight neighbouring pieces have eight rows, whose fours lie in different banks.
    __device__ static constexpr int row(int piece) {
      return kAlongSteps ? piece / (8 * kAlong) * 8 + piece % 8 : piece % kAcross * 2;
    }
    __device__ static constexpr int step(int piece) {
      return (kAlongSteps ? piece / 8 % kAlong : piece / kAcross) * Piece::kSteps;
    }
  };
  using Channels = Cut<Shape::kBlockD>;
  // From one piece of a thread to its next.
  static constexpr int kNextRow = kAlongSteps ? kThreads / Channels::kAlong : 0;
  static constexpr int kNextStep = kAlongSteps ? 0 : kThreads / Channels::kAcross * Piece::kSteps;
  static_assert(kAlongSteps ? kNextRow % 8 == 0 : kThreads % Channels::kAcross == 0);
  using States = Cut<(kOutputs ? 2 : 1) * Shape::kDstate>;  // of B, then of C

  static constexpr int kStep = kOutputs ? kBlockL : -kBlockL;  // from one tile to the next

  const ScanBlock& block;
  const SelectiveScanFwdParams& p;
  float* const shared;
  uint32_t* const slots;  // this thread's
  const int thread;
  const int d, t;  // of the first piece
  // Whether the thread has any piece, and whether those of full tiles are moved in one go.
  const bool has_piece, has_coefficients;
  bool is_fast, is_fast_n;
  float bias[kAlongSteps ? Channels::kOwn : 2], D[kAlongSteps ? Channels::kOwn : 2];
  Input u, delta, z, coefficients[States::kOwn];
  Output out;
  const int64_t u_tile, delta_tile, z_tile, out_tile;  // elements from one full tile to the next

  __device__ ScanStaging(const ScanBlock& block, float* shared, int thread)
      : block(block),
        p(block.p),
        shared(shared),
        slots(reinterpret_cast<uint32_t*>(shared + 2 * Shape::kStage) + 4 * thread),
        thread(thread),
        d(Channels::row(thread)),
        t(Channels::step(thread)),
        has_piece(thread < Channels::kPieces),
        has_coefficients(thread < States::kPieces),
        u_tile(kStep * p.u.stride[3]),
        delta_tile(kStep * p.delta.stride[3]),
        z_tile(kStep * p.z.stride[3]),
        out_tile(kStep * p.out.stride[3]) {
    const int64_t group = block.head / (p.nheads / p.ngroups), first_d = block.first_d + d;
    const int64_t first_t = kOutputs ? 0 : block.row.end - block.row.begin - kBlockL;
    u = block.cursor<Input>(p.u, block.head, first_d, first_t + t);
    delta = block.cursor<Input>(p.delta, block.head, first_d, first_t + t);
    z = block.cursor<Input>(p.z, block.head, first_d, first_t + t);
    out = block.cursor<Output>(p.out, block.head, first_d, first_t + t);
    const bool begins_aligned = !kAlongSteps || !p.chunk_states.data || p.chunk_size % 8 == 0;
    constexpr int kRowsUsed = (Channels::kOwn - 1) * kNextRow + Piece::kRows;
    is_fast = begins_aligned && d + kRowsUsed <= block.channels && u.is_aligned() &&
              delta.is_aligned() && (!p.z.data || z.is_aligned()) && out.is_aligned();
    is_fast_n = begins_aligned && p.dstate == Shape::kDstate;
#pragma unroll
    for (int i = 0; i < States::kOwn; ++i) {
      const int n = States::row(thread + i * kThreads), t_n = States::step(thread + i * kThreads);
      coefficients[i] = n < Shape::kDstate
                            ? block.cursor<Input>(p.B, group, n, first_t + t_n)
                            : block.cursor<Input>(p.C, group, n - Shape::kDstate, first_t + t_n);
      is_fast_n = is_fast_n && coefficients[i].is_aligned();
    }
#pragma unroll
    for (int i = 0; i < (kAlongSteps ? Channels::kOwn : 2); ++i) {
      const int at = d + (kAlongSteps ? i * kNextRow : i);
      const bool exists = at < block.channels;
      bias[i] = exists && p.delta_bias.data ? float_at(p.delta_bias, block.head, block.first_d + at)
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
    const int index =
        kTilesKept * kOperands * Channels::kOwn + tile % kCoefficientTilesKept * States::kOwn + i;
    return {slots + index * Slot::kWords};
  }

  // Begins to copy tile number `tile`, of `steps`.
  __device__ __forceinline__ void begin(int steps, int tile) {
    if (has_piece && steps > 0) {
      if (is_fast && steps == kBlockL) {
#pragma unroll
        for (int i = 0; i < Channels::kOwn; ++i) {
          const int rows = i * kNextRow, at = i * kNextStep;
          u.copy(rows, at, slot(tile, kU, i));
          delta.copy(rows, at, slot(tile, kDelta, i));
          if (kOutputs && p.z.data) z.copy(rows, at, slot(tile, kZ, i));
        }
        u.at += u_tile;
        delta.at += delta_tile;
        z.at += z_tile;
      } else {
        copy_some(u, steps, tile, kU);
        copy_some(delta, steps, tile, kDelta);
        if (kOutputs && p.z.data) copy_some(z, steps, tile, kZ);
      }
    }
    if (has_coefficients && steps > 0) {
      if (is_fast_n && steps == kBlockL) {
#pragma unroll
        for (int i = 0; i < States::kOwn; ++i)
          coefficients[i].copy(0, 0, coefficient_slot(tile, i));
      } else {
#pragma unroll
        for (int i = 0; i < States::kOwn; ++i) {
          const int piece = thread + i * kThreads, n = States::row(piece) % Shape::kDstate;
          coefficient_slot(tile, i).store(Input::load_some(
              coefficients[i], 0, 0, static_cast<int>(p.dstate) - n, steps - States::step(piece)));
        }
      }
#pragma unroll
      for (int i = 0; i < States::kOwn; ++i) coefficients[i].advance(kOutputs ? steps : kStep);
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_some(Input& input, int steps, int tile,
                                            Operand operand) const {
#pragma unroll
    for (int i = 0; i < Channels::kOwn; ++i) {
      const int rows = i * kNextRow, at = i * kNextStep;
      slot(tile, operand, i)
          .store(Input::load_some(input, rows, at, block.channels - d - rows, steps - t - at));
    }
    input.advance(kOutputs ? steps : kStep);
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
      if (has_piece && before > 0) finish(stage, before, tile + 2);
      wait_for_copies<1>();
      if (staged > 0) {
        if (has_coefficients) stage_coefficients(stage, tile);
        if (has_piece) convert(stage, staged, tile);
      }
      if (staged + finished > 0) scan_barrier();
    }
  }

  // The same for the states only; ends when the recurrence has no use for more.
  __device__ __forceinline__ void run_states(int tiles) {
    begin(kBlockL, 0);
    for (int tile = 0; tile < tiles; ++tile) {
      begin(tile + 1 < tiles ? kBlockL : 0, (tile + 1) % kTilesKept);
      float* stage = shared + tile % 2 * Shape::kStage;
      wait_for_copies<1>();
      if (has_coefficients) stage_coefficients(stage, tile % kTilesKept);
      if (has_piece) convert(stage, kBlockL, tile % kTilesKept);
      if (!scan_barrier_or(false)) break;
    }
    wait_for_copies<0>();
  }

  // The row in a stage, and the step, of a four.
  __device__ static __forceinline__ int row_of(int d, int i, int four) {
    return kAlongSteps ? d + i * kNextRow : d / 2 + four * (Shape::kBlockD / 2);
  }
  __device__ static __forceinline__ int step_of(int t, int i, int four) {
    return t + i * kNextStep + (kAlongSteps ? 4 * four : 0);
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
        for (int j = 0; j < 4; ++j) dt.value[j] = delta.get(four, j) + bias[kAlongSteps ? i : four];
        if (p.delta_softplus) {
#pragma unroll
          for (int j = 0; j < 4; ++j) dt.value[j] = softplus(dt.value[j]);
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

  __device__ __forceinline__ void finish(float* stage, int steps, int tile) {
#pragma unroll
    for (int i = 0; i < Channels::kOwn; ++i) {
      const Piece u = slot(tile, kU, i).load(), z = slot(tile, kZ, i).load();
      float value[8];
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const float* cells = Shape::cells(stage, 0, row_of(d, i, four)) + step_of(t, i, four);
        Four y = load_four(cells + Shape::part_of_lane(0) * Shape::kRow);
#pragma unroll
        for (int lane = 1; lane < Shape::kLanes; ++lane) {
          const Four more = load_four(cells + Shape::part_of_lane(lane) * Shape::kRow);
#pragma unroll
          for (int j = 0; j < 4; ++j) y.value[j] += more.value[j];
        }
        if (p.D.data) {
#pragma unroll
          for (int j = 0; j < 4; ++j) y.value[j] += D[kAlongSteps ? i : four] * u.get(four, j);
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
      const int rows = i * kNextRow, at = i * kNextStep;
      if (is_fast && steps == kBlockL)
        out.store(rows, at, piece);
      else
        Output::store_some(out, rows, at, block.channels - d - rows, steps - t - at, piece);
    }
    if (steps == kBlockL)
      out.at += out_tile;
    else
      out.advance(steps);
  }

  __device__ __forceinline__ void stage_coefficients(float* stage, int tile) const {
#pragma unroll
    for (int i = 0; i < States::kOwn; ++i) {
      const Piece piece = coefficient_slot(tile, i).load();
      const int at = thread + i * kThreads;
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const int row = States::row(at) + Piece::row(four), n = row % Shape::kDstate;
        store_four(
            Shape::coefficients(stage, row / Shape::kDstate, n % Shape::kLanes) +
                n / Shape::kLanes * Shape::kRow + States::step(at) + Piece::step(four, 0),
            {piece.get(four, 0), piece.get(four, 1), piece.get(four, 2), piece.get(four, 3)});
      }
    }
  }
};

}  // namespace ssmcore::cuda
