// The first and the last stage of scan_kernel.cuh: from operands in memory to Δ, Δu, B and C as
// floats in shared memory, and from what the recurrence left there to `out`.
#pragma once

#include "device/math.cuh"
#include "device/scan_piece.cuh"
#include "scan_shape.cuh"

namespace ssmcore::cuda {

// u, Δ, z and out. With kVectors all pieces of whole tiles are aligned. Without kOutputs: for the
// states only, from the last tile of a part to the first.
template <typename T, typename Shape, bool kAlongSteps, bool kVectors, bool kOutputs>
struct ScanStaging {
  using Piece = cuda::Piece<T, kAlongSteps>;
  using Input = Cursor<const T, kAlongSteps>;
  using Output = Cursor<T, kAlongSteps>;
  static constexpr int kThreads = Shape::kStagingThreads;
  using Slot = cuda::Slot<Piece, kThreads>;
  using Cut = PieceCut<Piece, Shape::kBlockD, Shape::kBlockL, kThreads>;
  static constexpr int kBlockL = Shape::kBlockL, kOwn = Cut::kOwn;
  // From one piece of a thread to its next.
  static constexpr int kNextRow = kAlongSteps ? kThreads / Cut::kAlong : 0;
  static constexpr int kNextStep = kAlongSteps ? 0 : kThreads / Cut::kAcross * Piece::kSteps;
  static_assert(kAlongSteps ? kNextRow % 8 == 0 : kThreads % Cut::kAcross == 0);

  // Copies wait in shared memory from two iterations before a tile's to the one after it. Only the
  // thread that copies a piece reads it.
  static constexpr int kTilesKept = 4;
  enum Operand { kU, kDelta, kZ, kOperands };
  static constexpr size_t kSlotBytes =
      sizeof(uint32_t) * Slot::kWords * kTilesKept * kOperands * kOwn;

  // After the stages in shared memory, and before those of B and C.
  __device__ static uint32_t* all_slots(float* shared) {
    return reinterpret_cast<uint32_t*>(shared + 2 * Shape::kStage);
  }
  __device__ static uint32_t* slots_end(float* shared) {
    return all_slots(shared) + kSlotBytes / sizeof(uint32_t);
  }

  const ScanBlock& block;
  const SelectiveScanFwdParams& p;
  uint32_t* const slots;  // this thread's
  const int d, t;         // of the first piece
  const bool has_piece;
  static constexpr int kParameters = kAlongSteps ? kOwn : 2;
  float bias[kParameters], D[kParameters];
  const T *u, *delta, *z;
  T* out;

  __device__ ScanStaging(const ScanBlock& block, float* shared, int thread)
      : block(block),
        p(block.p),
        slots(all_slots(shared) + 4 * thread),
        d(Cut::row(thread)),
        t(Cut::step(thread)),
        has_piece(thread < Cut::kPieces && d < block.channels) {
    const int64_t first_d = block.first_d + d;
    const int64_t first_t = kOutputs ? t : block.row.end - block.row.begin - kBlockL + t;
    u = block.at<const T>(p.u, block.head, first_d, first_t);
    delta = block.at<const T>(p.delta, block.head, first_d, first_t);
    z = block.at<const T>(p.z, block.head, first_d, first_t);
    out = block.at<T>(p.out, block.head, first_d, first_t);
#pragma unroll
    for (int i = 0; i < kParameters; ++i) {
      const int at = d + (kAlongSteps ? i * kNextRow : i);
      const bool exists = at < block.channels;
      bias[i] = exists && p.delta_bias.data ? float_at(p.delta_bias, block.head, block.first_d + at)
                                            : 0.0f;
      D[i] = exists && p.D.data ? float_at(p.D, block.head, block.first_d + at) : 0.0f;
    }
  }

  __device__ __forceinline__ Slot slot(int tile, Operand operand, int i) const {
    return {slots + ((tile % kTilesKept * kOperands + operand) * kOwn + i) * Slot::kWords};
  }
  __device__ __forceinline__ int rows_left(int i) const {
    return block.channels - d - i * kNextRow;
  }
  __device__ __forceinline__ int steps_left(int steps, int i) const {
    return steps - t - i * kNextStep;
  }

  // Begins to copy tile number `tile`, of `steps`.
  __device__ __forceinline__ void begin(int tile, int steps) {
    if (!has_piece || steps == 0) return;
    begin_operand(u, p.u, tile, kU, steps);
    begin_operand(delta, p.delta, tile, kDelta, steps);
    if (kOutputs && p.z.data) begin_operand(z, p.z, tile, kZ, steps);
  }
  __device__ __forceinline__ void begin_operand(const T*& from, const Strided<4>& strides, int tile,
                                                Operand operand, int steps) {
    const Input input{from, strides.stride[2], strides.stride[3]};
    if (kVectors && steps == kBlockL) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (rows_left(i) > 0) input.copy(i * kNextRow, i * kNextStep, slot(tile, operand, i));
    } else {
#pragma unroll 1
      for (int i = 0; i < kOwn; ++i)
        slot(tile, operand, i)
            .store(Input::load_some(input, i * kNextRow, i * kNextStep, rows_left(i),
                                    steps_left(steps, i)));
    }
    from += (kOutputs ? steps : -kBlockL) * strides.stride[3];
  }

  // The cells of a four.
  __device__ __forceinline__ float* cells(float* stage, int part, int i, int four) const {
    const int row = kAlongSteps ? d + i * kNextRow : d / 2 + four * (Shape::kBlockD / 2);
    return Shape::cells(stage, part, row) + t + i * kNextStep + Piece::step(four, 0);
  }

  // From copies to Δ and Δu.
  __device__ __forceinline__ void convert(float* stage, int tile, int steps) const {
    if (!has_piece || steps == 0) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const Piece u = slot(tile, kU, i).load(), delta = slot(tile, kDelta, i).load();
      Four dt[2];
#pragma unroll
      for (int j = 0; j < 8; ++j)
        dt[j / 4].value[j % 4] = delta.get(j / 4, j % 4) + bias[kAlongSteps ? i : j / 4];
      if (p.delta_softplus) {
#pragma unroll
        for (int j = 0; j < 8; ++j) dt[j / 4].value[j % 4] = softplus(dt[j / 4].value[j % 4]);
      }
      if (steps < kBlockL) {
#pragma unroll
        for (int j = 0; j < 8; ++j)  // such steps leave the states as they are
          if (Piece::step(j / 4, j % 4) >= steps_left(steps, i)) dt[j / 4].value[j % 4] = 0;
      }
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        Four dt_u;
#pragma unroll
        for (int j = 0; j < 4; ++j) dt_u.value[j] = dt[four].value[j] * u.get(four, j);
        store_four(cells(stage, 0, i, four), dt[four]);
        store_four(cells(stage, 1, i, four), dt_u);
      }
    }
  }

  // From what the lanes left of y to out.
  __device__ __forceinline__ void finish(float* stage, int tile, int steps) {
    if (!has_piece || steps == 0) return;
    const Output output{out, p.out.stride[2], p.out.stride[3]};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const Piece u = slot(tile, kU, i).load();
      Four y[2];
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        y[four] = load_four(cells(stage, Shape::y_part(0), i, four));
#pragma unroll
        for (int part = 1; part < Shape::kYParts; ++part) {
          const Four more = load_four(cells(stage, Shape::y_part(part), i, four));
#pragma unroll
          for (int j = 0; j < 4; ++j) y[four].value[j] += more.value[j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) y[four].value[j] += D[kAlongSteps ? i : four] * u.get(four, j);
      }
      if (p.z.data) {
        const Piece z = slot(tile, kZ, i).load();
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j / 4].value[j % 4] *= silu(z.get(j / 4, j % 4));
      }
      float value[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) value[Piece::index(j / 4, j % 4)] = y[j / 4].value[j % 4];
      Piece piece;
      piece.set(value);
      const int rows = i * kNextRow, at = i * kNextStep;
      if (!kVectors || steps < kBlockL)
        Output::store_some(output, rows, at, rows_left(i), steps_left(steps, i), piece);
      else if (rows_left(i) > 0)
        output.store(rows, at, piece);
    }
    out += steps * p.out.stride[3];
  }
};

// B, and after it C (kOutputs), in pieces.
template <typename T, typename Shape, bool kAlongSteps, bool kOutputs>
struct CoefficientStaging {
  using Piece = cuda::Piece<T, kAlongSteps>;
  using Input = Cursor<const T, kAlongSteps>;
  static constexpr int kThreads = Shape::kStagingThreads;
  using Slot = cuda::Slot<Piece, kThreads>;
  static constexpr int kBlockL = Shape::kBlockL, kDstate = Shape::kDstate;
  using Cut = PieceCut<Piece, (kOutputs ? 2 : 1) * kDstate, kBlockL, kThreads>;
  static constexpr int kOwn = Cut::kOwn;

  // Copies wait in shared memory until they are staged.
  static constexpr int kTilesKept = 2;
  static constexpr size_t kSlotBytes = sizeof(uint32_t) * Slot::kWords * kTilesKept * kOwn;

  const SelectiveScanFwdParams& p;
  uint32_t* const slots;  // this thread's
  const int thread;
  Input from[kOwn];
  bool is_fast;  // whether those of whole tiles are aligned and exist

  // `slots`: of all threads.
  __device__ CoefficientStaging(const ScanBlock& block, uint32_t* slots, int thread)
      : p(block.p), slots(slots + 4 * thread), thread(thread) {
    const int64_t group = block.head / (p.nheads / p.ngroups);
    const int64_t first_t = kOutputs ? 0 : block.row.end - block.row.begin - kBlockL;
    is_fast = p.dstate == kDstate &&
              (!kAlongSteps || !p.chunk_states.data || p.chunk_size % Piece::kSteps == 0);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int piece = thread + i * kThreads, n = Cut::row(piece);
      const Strided<4>& operand = n < kDstate ? p.B : p.C;
      from[i] = {block.at<const T>(operand, group, n % kDstate, first_t + Cut::step(piece)),
                 operand.stride[2], operand.stride[3]};
      is_fast = is_fast && from[i].is_aligned();
    }
  }

  __device__ __forceinline__ bool has_piece() const {
    return Cut::kPieces >= kThreads || thread < Cut::kPieces;
  }
  __device__ __forceinline__ Slot slot(int tile, int i) const {
    return {slots + (tile % kTilesKept * kOwn + i) * Slot::kWords};
  }

  // Begins to copy tile number `tile`, of `steps`.
  __device__ __forceinline__ void begin(int tile, int steps) {
    if (!has_piece() || steps == 0) return;
    if (is_fast && steps == kBlockL) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) from[i].copy(0, 0, slot(tile, i));
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int piece = thread + i * kThreads, n = Cut::row(piece) % kDstate;
        slot(tile, i).store(Input::load_some(from[i], 0, 0, static_cast<int>(p.dstate) - n,
                                             steps - Cut::step(piece)));
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) from[i].advance(kOutputs ? steps : -kBlockL);
  }

  __device__ __forceinline__ void convert(float* stage, int tile) const {
    if (!has_piece()) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const Piece piece = slot(tile, i).load();
      const int at = thread + i * kThreads;
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const int n = Cut::row(at) + Piece::row(four);
        store_four(
            Shape::coefficients(stage, n / kDstate, n % kDstate) + Cut::step(at) +
                Piece::step(four, 0),
            {piece.get(four, 0), piece.get(four, 1), piece.get(four, 2), piece.get(four, 3)});
      }
    }
  }
};

}  // namespace ssmcore::cuda
