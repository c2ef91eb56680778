// What scan_bwd_kernel.cuh does once for an element: from operands in memory to Δ, Δu, dy, B and C
// as floats in shared memory, and from what the recurrence left there to du, ddelta and dz.
#pragma once

#include "device/math.cuh"
#include "device/scan_piece.cuh"
#include "scan_bwd_shape.cuh"

namespace ssmcore::cuda {

// Of what the sums over time need.
enum class ScanBwdUse { all, states, gradients };

// B and C of a tile, as floats.
template <typename T, bool kAlongSteps, ScanBwdUse kUse>
__device__ __forceinline__ void stage_coefficients(const ScanBwdBlock& block, int64_t t,
                                                   int steps) {
  using Shape = ScanBwdShape;
  using Input = Cursor<const T, kAlongSteps>;
  using Piece = typename Input::Piece;
  constexpr int kOperands = kUse == ScanBwdUse::all ? 2 : 1;
  using Cut = PieceCut<Piece, kOperands * Shape::kDstate, Shape::kTile, Shape::kThreads>;
  static_assert(Cut::kOwn == 1);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= Cut::kPieces) return;
  const SelectiveScanFwdParams& p = block.p.fwd;
  const int row = Cut::row(thread), step = Cut::step(thread), n = row % Shape::kDstate;
  const int which = kUse == ScanBwdUse::gradients ? 1 : row / Shape::kDstate;
  const Strided<4>& operand = which == 0 ? p.B : p.C;
  const int64_t group = block.head / (p.nheads / p.ngroups);
  const Input from{static_cast<const T*>(operand.data) + block.at(operand, group, n, t + step),
                   operand.stride[2], operand.stride[3]};
  const bool is_whole = p.dstate == Shape::kDstate && steps == Shape::kTile && from.is_aligned();
  const Piece piece =
      is_whole ? from.load()
               : Input::load_some(from, 0, 0, static_cast<int>(p.dstate) - n, steps - step);
#pragma unroll
  for (int four = 0; four < 2; ++four)
    store_four(block.memory.coefficients(which, n + Piece::row(four)) + step + Piece::step(four, 0),
               {piece.get(four, 0), piece.get(four, 1), piece.get(four, 2), piece.get(four, 3)});
}

// A tile of a block's channels, of which a thread has two pieces. What must last from one tile to
// the next is in shared memory: the recurrence needs the registers.
template <typename T, bool kAlongSteps>
struct ScanBwdTile {
  using Shape = ScanBwdShape;
  using Operand = ScanBwdOperand;
  using Piece = cuda::Piece<T, kAlongSteps>;
  using Cut = PieceCut<Piece, Shape::kBlockD, Shape::kTile, Shape::kThreads>;
  static constexpr int kOwn = Cut::kOwn, kChannels = 2;
  static_assert(kOwn == 2);
  // From the first piece to the second.
  static constexpr int kNextRow = kAlongSteps ? Shape::kBlockD / 2 : 0;
  static constexpr int kNextStep = kAlongSteps ? 0 : Shape::kTile / 2;

  const SelectiveScanBwdParams& p;
  const ScanBwdMemory memory;
  const int channels;  // of the block
  const int steps;
  const int64_t t;  // of the row

  // The first piece's channel and step.
  __device__ static int d() { return Cut::row(threadIdx.x); }
  __device__ static int step() { return Cut::step(threadIdx.x); }
  // Which of the thread's two channels a four has: that of piece i, or one of those of both pieces.
  __device__ static constexpr int own(int i, int four) { return kAlongSteps ? i : four; }
  __device__ static int own_channel(int own) { return d() + (kAlongSteps ? own * kNextRow : own); }
  // The row of a plane, and the step, of a four.
  __device__ static int row(int i, int four) {
    return kAlongSteps ? d() + i * kNextRow : d() / 2 + four * (Shape::kBlockD / 2);
  }
  __device__ static int step_of(int i, int four) {
    return step() + i * kNextStep + Piece::step(four, 0);
  }

  // Leaves Δ, Δu and dy, as far as `kUse` needs them. `moves_vectors`: whether the pieces of whole
  // tiles are aligned.
  template <ScanBwdUse kUse>
  __device__ __forceinline__ void stage(bool moves_vectors) const {
    if (moves_vectors && steps == Shape::kTile)
      stage_pieces<kUse, true>();
    else
      stage_some<kUse>(*this);
  }
  // From what the recurrence left of the tile: du, ddelta and dz; adds to dD and ddelta_bias.
  __device__ __forceinline__ void finish(bool moves_vectors) const {
    if (moves_vectors && steps == Shape::kTile)
      finish_pieces<true>();
    else
      finish_some(*this);
  }

  // The threads that have pieces of channel `channel`, and which of theirs it is.
  template <typename Function>
  __device__ __forceinline__ static void for_each_thread_of(int channel, const Function& function) {
    constexpr int kAlong = kAlongSteps ? Cut::kAlong : Cut::kAlong / kOwn;
#pragma unroll
    for (int i = 0; i < kAlong; ++i)
      if constexpr (kAlongSteps)
        function(channel % kNextRow / 8 * (8 * kAlong) + i * 8 + channel % 8, channel / kNextRow);
      else
        function(i * Cut::kAcross + channel / 2, channel % 2);
  }

 private:
  template <ScanBwdUse kUse>
  __device__ __noinline__ static void stage_some(ScanBwdTile tile) {
    tile.template stage_pieces<kUse, false>();
  }
  __device__ __noinline__ static void finish_some(ScanBwdTile tile) {
    tile.template finish_pieces<false>();
  }

  // At piece i.
  template <typename Pointer>
  __device__ __forceinline__ Cursor<Pointer, kAlongSteps> cursor(Operand operand,
                                                                 const Strided<4>& strides,
                                                                 int i) const {
    Pointer* const row = static_cast<Pointer*>(strides.data) + memory.row_at(operand);
    return {row + (d() + i * kNextRow) * strides.stride[2] +
                (t + step() + i * kNextStep) * strides.stride[3],
            strides.stride[2], strides.stride[3]};
  }
  __device__ __forceinline__ int rows_left(int i) const { return channels - d() - i * kNextRow; }
  __device__ __forceinline__ int steps_left(int i) const { return steps - step() - i * kNextStep; }

  // Those of whole tiles are moved as vectors.
  template <bool kWhole>
  __device__ __forceinline__ Piece load(Operand operand, const Strided<4>& strides, int i) const {
    using Input = Cursor<const T, kAlongSteps>;
    const Input from = cursor<const T>(operand, strides, i);
    if constexpr (kWhole)
      return rows_left(i) > 0 ? from.load() : Piece{};
    else
      return Input::load_some(from, 0, 0, rows_left(i), steps_left(i));
  }
  template <bool kWhole>
  __device__ __forceinline__ void store(Operand operand, const StridedGradient<4>& gradient, int i,
                                        float (&value)[8]) const {
    using Output = Cursor<T, kAlongSteps>;
    if (!gradient.data) return;
    if (gradient.accumulate) {
      const Piece before = load<kWhole>(operand, gradient, i);
      for_each([&](int j) { value[j] += before.get(j / 4, j % 4); });
    }
    float in_order[8];
    for_each([&](int j) { in_order[Piece::index(j / 4, j % 4)] = value[j]; });
    Piece piece;
    piece.set(in_order);
    const Output to = cursor<T>(operand, gradient, i);
    if constexpr (kWhole) {
      if (rows_left(i) > 0) to.store(0, 0, piece);
    } else {
      Output::store_some(to, 0, 0, rows_left(i), steps_left(i), piece);
    }
  }

  template <ScanBwdUse kUse, bool kWhole>
  __device__ __forceinline__ void stage_pieces() const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) stage_piece<kUse, kWhole>(i);
  }
  template <ScanBwdUse kUse, bool kWhole>
  __device__ __forceinline__ void stage_piece(int i) const {
    constexpr bool kInputs = kUse != ScanBwdUse::gradients, kOutputs = kUse != ScanBwdUse::states;
    const SelectiveScanFwdParams& fwd = p.fwd;
    const Piece delta = load<kWhole>(Operand::delta, fwd.delta, i);
    Piece u, z, dout;
    if (kInputs) u = load<kWhole>(Operand::u, fwd.u, i);
    if (kOutputs && fwd.z.data) z = load<kWhole>(Operand::z, fwd.z, i);
    if (kOutputs) dout = load<kWhole>(Operand::dout, p.dout, i);
    float value[8];
    for_each([&](int j) {
      value[j] = delta.get(j / 4, j % 4) + memory.bias(own_channel(own(i, j / 4)));
    });
    if (fwd.delta_softplus) for_each([&](int j) { value[j] = softplus(value[j]); });
    // What does not exist leaves the states as they are.
    for_each([&](int j) {
      if (own_channel(own(i, j / 4)) >= channels || (!kWhole && step_of(i, j / 4) + j % 4 >= steps))
        value[j] = 0;
    });
    store_plane(value, i, [&](int r) { return memory.delta(r); });
    if (kInputs) {
      for_each([&](int j) { value[j] *= u.get(j / 4, j % 4); });
      store_plane(value, i, [&](int r) { return memory.delta_u(r); });
    }
    if (kOutputs) {
      for_each([&](int j) { value[j] = dout.get(j / 4, j % 4); });
      if (fwd.z.data) for_each([&](int j) { value[j] *= silu(z.get(j / 4, j % 4)); });
      store_plane(value, i, [&](int r) { return memory.dy(r); });
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void finish_pieces() const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) finish_piece<kWhole>(i);
  }
  template <bool kWhole>
  __device__ __forceinline__ void finish_piece(int i) const {
    const SelectiveScanFwdParams& fwd = p.fwd;
    const Piece dout = load<kWhole>(Operand::dout, p.dout, i);
    Piece z, delta;
    if (fwd.z.data) z = load<kWhole>(Operand::z, fwd.z, i);
    const Piece u = load<kWhole>(Operand::u, fwd.u, i);
    if (fwd.delta_softplus) delta = load<kWhole>(Operand::delta, fwd.delta, i);
    const auto D = [&](int j) { return memory.D(own_channel(own(i, j / 4))); };

    float dy[8], dx[8], value[8];
    for_each([&](int j) { dy[j] = dout.get(j / 4, j % 4); });
    if (fwd.z.data) {
      load_plane(value, i, [&](int r, int at) { return memory.y(r, at / 4); });
      for_each([&](int j) {
        const float y = value[j] + D(j) * u.get(j / 4, j % 4);
        const float gate = z.get(j / 4, j % 4), opening = sigmoid(gate);
        const float opened = dy[j] * opening;
        dy[j] = opened * gate;
        value[j] = y * (opened + dy[j] * (1.0f - opening));
      });
      store<kWhole>(Operand::dz, p.dz, i, value);
    }
    load_plane(dx, i, [&](int r, int at) { return memory.dx(r, at / 4); });
    load_plane(value, i, [&](int r, int at) { return memory.delta(r) + at; });
    for_each([&](int j) { value[j] = value[j] * dx[j] + D(j) * dy[j]; });
    store<kWhole>(Operand::du, p.du, i, value);
    load_plane(value, i, [&](int r, int at) { return memory.delta_u(r) + at; });
    for_each([&](int j) {
      value[j] = u.get(j / 4, j % 4) * dx[j] + kLn2 * value[j];
      dy[j] *= u.get(j / 4, j % 4);
    });
    if (fwd.delta_softplus)
      for_each([&](int j) {
        const float raw = delta.get(j / 4, j % 4) + memory.bias(own_channel(own(i, j / 4)));
        value[j] *= raw > 20.0f ? 1.0f : sigmoid(raw);
      });
    float* const sums = memory.thread_sums();
    Four sum = load_four(sums);  // dD of both channels, and ddelta_bias
    for_each([&](int j) {
      // Beyond the last step nothing was left in shared memory.
      if (!kWhole && step_of(i, j / 4) + j % 4 >= steps) return;
      sum.value[own(i, j / 4)] += dy[j];
      sum.value[kChannels + own(i, j / 4)] += value[j];
    });
    store_four(sums, sum);
    store<kWhole>(Operand::ddelta, p.ddelta, i, value);
  }

  template <typename Function>
  __device__ __forceinline__ static void for_each(const Function& function) {
#pragma unroll
    for (int j = 0; j < 8; ++j) function(j);
  }
  template <typename Row>
  __device__ __forceinline__ static void store_plane(const float (&value)[8], int i,
                                                     const Row& row_of) {
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const float* of = value + 4 * four;
      store_four(row_of(row(i, four)) + step_of(i, four), {of[0], of[1], of[2], of[3]});
    }
  }
  template <typename At>
  __device__ __forceinline__ static void load_plane(float (&value)[8], int i, const At& at) {
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const Four of = load_four(at(row(i, four), step_of(i, four)));
#pragma unroll
      for (int j = 0; j < 4; ++j) value[4 * four + j] = of.value[j];
    }
  }
};

// What a block has for all tiles.
__device__ inline void begin_block(const ScanBwdBlock& block) {
  const ScanBwdMemory& memory = block.memory;
  const SelectiveScanFwdParams& p = block.p.fwd;
  store_four(memory.thread_sums(), {});
  const int d = static_cast<int>(threadIdx.x);
  if (d >= ScanBwdShape::kBlockD) return;
  const auto load = [&](const Strided<2>& of) {
    return of.data && d < block.channels ? float_at(of, block.head, block.first_d + d) : 0.0f;
  };
  memory.bias(d) = load(p.delta_bias);
  memory.D(d) = load(p.D);
}

// And for all of those of its row. Between barriers.
__device__ inline void begin_row(const ScanBwdBlock& block) {
  if (threadIdx.x != 0) return;
  const SelectiveScanBwdParams& p = block.p;
  const auto begin = [&](ScanBwdOperand operand, const Strided<4>& strides) {
    block.memory.row_at(operand) = block.at(strides, block.head, block.first_d, 0);
  };
  begin(ScanBwdOperand::u, p.fwd.u);
  begin(ScanBwdOperand::delta, p.fwd.delta);
  begin(ScanBwdOperand::z, p.fwd.z);
  begin(ScanBwdOperand::dout, p.dout);
  begin(ScanBwdOperand::du, p.du);
  begin(ScanBwdOperand::ddelta, p.ddelta);
  begin(ScanBwdOperand::dz, p.dz);
}

// Leaves the block's dD and ddelta_bias in `sums`, kDstate + 2 a channel.
template <typename Tile>
__device__ __forceinline__ void store_thread_sums(const ScanBwdBlock& block, float* sums) {
  using Shape = ScanBwdShape;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= 2 * Shape::kBlockD || thread % Shape::kBlockD >= block.channels) return;
  const int d = thread % Shape::kBlockD, which = thread / Shape::kBlockD;
  float sum = 0;
  Tile::for_each_thread_of(d, [&](int of, int own) {
    sum += block.memory.thread_sums(of)[which * Tile::kChannels + own];
  });
  sums[block.channel(d) * (Shape::kDstate + 2) + Shape::kDstate + which] = sum;
}

}  // namespace ssmcore::cuda
