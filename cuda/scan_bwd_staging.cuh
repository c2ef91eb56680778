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
__device__ __forceinline__ void stage_coefficients(const ScanBwdBlock& block,
                                                   const ScanBwdMemory& memory, int64_t t,
                                                   int steps) {
  using Shape = ScanBwdShape;
  using Input = Cursor<const T, kAlongSteps>;
  using Piece = typename Input::Piece;
  constexpr int kOperands = kUse == ScanBwdUse::all ? 2 : 1;
  using Cut = PieceCut<Piece, kOperands * Shape::kDstate, Shape::kTile, Shape::kThreads>;
  const SelectiveScanFwdParams& p = block.p.fwd;
  const int64_t group = block.head / (p.nheads / p.ngroups);
  for (int i = static_cast<int>(threadIdx.x); i < Cut::kPieces; i += Shape::kThreads) {
    const int row = Cut::row(i), step = Cut::step(i), n = row % Shape::kDstate;
    const int which = kUse == ScanBwdUse::gradients ? 1 : row / Shape::kDstate;
    const Strided<4>& operand = which == 0 ? p.B : p.C;
    const Input from{block.at<const T>(operand, group, n, t + step), operand.stride[2],
                     operand.stride[3]};
    const bool is_whole = p.dstate == Shape::kDstate && steps == Shape::kTile && from.is_aligned();
    const Piece piece =
        is_whole ? from.load()
                 : Input::load_some(from, 0, 0, static_cast<int>(p.dstate) - n, steps - step);
#pragma unroll
    for (int four = 0; four < 2; ++four)
      store_four(memory.coefficients(which, n + Piece::row(four)) + step + Piece::step(four, 0),
                 {piece.get(four, 0), piece.get(four, 1), piece.get(four, 2), piece.get(four, 3)});
  }
}

// One thread: two pieces of a tile.
template <typename T, bool kAlongSteps>
struct ScanBwdStaging {
  using Shape = ScanBwdShape;
  using Piece = cuda::Piece<T, kAlongSteps>;
  using Cut = PieceCut<Piece, Shape::kBlockD, Shape::kTile, Shape::kThreads>;
  static constexpr int kOwn = Cut::kOwn, kChannels = 2;
  static_assert(kOwn == 2);
  // From the first piece to the second.
  static constexpr int kNextRow = kAlongSteps ? Shape::kBlockD / 2 : 0;
  static constexpr int kNextStep = kAlongSteps ? 0 : Shape::kTile / 2;

  const ScanBwdBlock& block;
  const SelectiveScanBwdParams& p;
  const ScanBwdMemory memory;
  const bool moves_vectors;  // whether pieces of whole tiles are aligned
  const int d, step;         // of the first piece
  const T *u, *delta, *z, *dout;
  T *du, *ddelta, *dz;
  // Of a channel of each piece, or of both channels of the pieces.
  float dD[kChannels] = {}, dbias[kChannels] = {};

  __device__ ScanBwdStaging(const ScanBwdBlock& block, const ScanBwdMemory& memory,
                            bool moves_vectors)
      : block(block),
        p(block.p),
        memory(memory),
        moves_vectors(moves_vectors),
        d(Cut::row(threadIdx.x)),
        step(Cut::step(threadIdx.x)) {}

  // Of the row that the block now has.
  __device__ void begin_row() {
    const auto first = [&](const Strided<4>& operand) {
      return block.at<T>(operand, block.head, block.first_d + d, step);
    };
    u = first(p.fwd.u);
    delta = first(p.fwd.delta);
    z = first(p.fwd.z);
    dout = first(p.dout);
    du = first(p.du);
    ddelta = first(p.ddelta);
    dz = first(p.dz);
  }

  __device__ static constexpr int own(int i, int four) { return kAlongSteps ? i : four; }
  // Channel, row of a plane and step of a four.
  __device__ int channel(int i, int four) const { return d + i * kNextRow + Piece::row(four); }
  __device__ int row(int i, int four) const {
    return kAlongSteps ? channel(i, four) : d / 2 + four * (Shape::kBlockD / 2);
  }
  __device__ int step_of(int i, int four) const {
    return step + i * kNextStep + Piece::step(four, 0);
  }

  // A thread's pieces of an operand. A whole tile's are moved as vectors.
  template <bool kWhole>
  __device__ __forceinline__ void load(Piece (&pieces)[kOwn], const T* from,
                                       const Strided<4>& strides, int64_t t, int steps) const {
    using Input = Cursor<const T, kAlongSteps>;
    Input input{from + t * strides.stride[3], strides.stride[2], strides.stride[3]};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int rows_left = block.channels - d - i * kNextRow;
      if constexpr (kWhole)
        pieces[i] = rows_left > 0 ? input.load() : Piece{};
      else
        pieces[i] = Input::load_some(input, 0, 0, rows_left, steps - step - i * kNextStep);
      input.at += kNextRow * input.stride_row + kNextStep * input.stride_t;
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void store(const StridedGradient<4>& gradient, T* to, int64_t t,
                                        int steps, float (&value)[kOwn][8]) const {
    using Output = Cursor<T, kAlongSteps>;
    if (!gradient.data) return;
    if (gradient.accumulate) {
      Piece before[kOwn];
      load<kWhole>(before, to, gradient, t, steps);
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) value[i][j] += before[i].get(j / 4, j % 4);
    }
    Output output{to + t * gradient.stride[3], gradient.stride[2], gradient.stride[3]};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float in_order[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) in_order[Piece::index(j / 4, j % 4)] = value[i][j];
      Piece piece;
      piece.set(in_order);
      const int rows_left = block.channels - d - i * kNextRow;
      if constexpr (kWhole) {
        if (rows_left > 0) output.store(0, 0, piece);
      } else {
        Output::store_some(output, 0, 0, rows_left, steps - step - i * kNextStep, piece);
      }
      output.at += kNextRow * output.stride_row + kNextStep * output.stride_t;
    }
  }

  // Of the channels of dD and dbias; 0 where there is none.
  __device__ __forceinline__ void load(float (&to)[kChannels], const Strided<2>& of) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int at = d + (kAlongSteps ? i * kNextRow : i);
      to[i] = of.data && at < block.channels ? float_at(of, block.head, block.first_d + at) : 0.0f;
    }
  }

  // Leaves Δ, Δu and dy of the tile of `steps` from t on, as far as `kUse` needs them.
  template <ScanBwdUse kUse>
  __device__ __forceinline__ void stage(int64_t t, int steps) const {
    if (moves_vectors && steps == Shape::kTile)
      stage_pieces<kUse, true>(t, Shape::kTile);
    else
      stage_pieces<kUse, false>(t, steps);
    stage_coefficients<T, kAlongSteps, kUse>(block, memory, t, steps);
  }
  template <ScanBwdUse kUse, bool kWhole>
  __device__ __forceinline__ void stage_pieces(int64_t t, int steps) const {
    constexpr bool kInputs = kUse != ScanBwdUse::gradients, kOutputs = kUse != ScanBwdUse::states;
    const SelectiveScanFwdParams& fwd = p.fwd;
    float bias[kChannels];
    load(bias, fwd.delta_bias);
    Piece delta_t[kOwn], u_t[kOwn], z_t[kOwn], dout_t[kOwn];
    load<kWhole>(delta_t, delta, fwd.delta, t, steps);
    if (kInputs) load<kWhole>(u_t, u, fwd.u, t, steps);
    if (kOutputs && fwd.z.data) load<kWhole>(z_t, z, fwd.z, t, steps);
    if (kOutputs) load<kWhole>(dout_t, dout, p.dout, t, steps);
    float dt[kOwn][8];
    for_each_element(
        [&](int i, int j) { dt[i][j] = delta_t[i].get(j / 4, j % 4) + bias[own(i, j / 4)]; });
    if (fwd.delta_softplus) for_each_element([&](int i, int j) { dt[i][j] = softplus(dt[i][j]); });
    // What does not exist leaves the states as they are.
    for_each_element([&](int i, int j) {
      if (channel(i, j / 4) >= block.channels || (!kWhole && step_of(i, j / 4) + j % 4 >= steps))
        dt[i][j] = 0;
    });
    if (kInputs) {
      float dt_u[kOwn][8];
      for_each_element([&](int i, int j) { dt_u[i][j] = dt[i][j] * u_t[i].get(j / 4, j % 4); });
      store_plane(dt_u, [&](int r) { return memory.delta_u(r); });
    }
    store_plane(dt, [&](int r) { return memory.delta(r); });
    if (kOutputs) {
      float dy[kOwn][8];
      for_each_element([&](int i, int j) { dy[i][j] = dout_t[i].get(j / 4, j % 4); });
      if (fwd.z.data)
        for_each_element([&](int i, int j) { dy[i][j] *= silu(z_t[i].get(j / 4, j % 4)); });
      store_plane(dy, [&](int r) { return memory.dy(r); });
    }
  }

  // From what the recurrence left of the tile: du, ddelta and dz; adds to dD and ddelta_bias.
  __device__ __forceinline__ void finish(int64_t t, int steps) {
    if (moves_vectors && steps == Shape::kTile)
      finish_pieces<true>(t, Shape::kTile);
    else
      finish_pieces<false>(t, steps);
  }
  template <bool kWhole>
  __device__ __forceinline__ void finish_pieces(int64_t t, int steps) {
    const SelectiveScanFwdParams& fwd = p.fwd;
    float bias[kChannels], D[kChannels];
    load(bias, fwd.delta_bias);
    load(D, fwd.D);
    Piece delta_t[kOwn], u_t[kOwn], z_t[kOwn], dout_t[kOwn];
    load<kWhole>(dout_t, dout, p.dout, t, steps);
    if (fwd.z.data) load<kWhole>(z_t, z, fwd.z, t, steps);
    load<kWhole>(u_t, u, fwd.u, t, steps);
    if (fwd.delta_softplus) load<kWhole>(delta_t, delta, fwd.delta, t, steps);

    float dy[kOwn][8];
    for_each_element([&](int i, int j) { dy[i][j] = dout_t[i].get(j / 4, j % 4); });
    if (fwd.z.data) {
      float y[kOwn][8];
      load_plane(y, [&](int r, int at) { return memory.y(r, at / 4); });
      for_each_element([&](int i, int j) {
        y[i][j] += D[own(i, j / 4)] * u_t[i].get(j / 4, j % 4);
        const float gate = z_t[i].get(j / 4, j % 4), opening = sigmoid(gate);
        const float opened = dy[i][j] * opening;
        dy[i][j] = opened * gate;
        y[i][j] *= opened + dy[i][j] * (1.0f - opening);
      });
      store<kWhole>(p.dz, dz, t, steps, y);
    }
    float dx[kOwn][8], dt[kOwn][8];
    load_plane(dx, [&](int r, int at) { return memory.dx(r, at / 4); });
    load_plane(dt, [&](int r, int at) { return memory.delta(r) + at; });
    for_each_element(
        [&](int i, int j) { dt[i][j] = dt[i][j] * dx[i][j] + D[own(i, j / 4)] * dy[i][j]; });
    store<kWhole>(p.du, du, t, steps, dt);
    load_plane(dt, [&](int r, int at) { return memory.delta_u(r) + at; });
    for_each_element([&](int i, int j) {
      const float u_j = u_t[i].get(j / 4, j % 4);
      dx[i][j] = u_j * dx[i][j] + kLn2 * dt[i][j];
      dy[i][j] *= u_j;
    });
    if (fwd.delta_softplus)
      for_each_element([&](int i, int j) {
        const float raw = delta_t[i].get(j / 4, j % 4) + bias[own(i, j / 4)];
        dx[i][j] *= raw > 20.0f ? 1.0f : sigmoid(raw);
      });
    for_each_element([&](int i, int j) {
      // Beyond the last step nothing was left in shared memory.
      if (!kWhole && step_of(i, j / 4) + j % 4 >= steps) return;
      dD[own(i, j / 4)] += dy[i][j];
      dbias[own(i, j / 4)] += dx[i][j];
    });
    store<kWhole>(p.ddelta, ddelta, t, steps, dx);
  }

  template <typename Function>
  __device__ __forceinline__ static void for_each_element(const Function& function) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) function(i, j);
  }
  template <typename Row>
  __device__ __forceinline__ void store_plane(const float (&value)[kOwn][8],
                                              const Row& row_of) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const float* of = value[i] + 4 * four;
        store_four(row_of(row(i, four)) + step_of(i, four), {of[0], of[1], of[2], of[3]});
      }
  }
  template <typename At>
  __device__ __forceinline__ void load_plane(float (&value)[kOwn][8], const At& at) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const Four of = load_four(at(row(i, four), step_of(i, four)));
#pragma unroll
        for (int j = 0; j < 4; ++j) value[i][4 * four + j] = of.value[j];
      }
  }

  // Leaves the block's dD and ddelta_bias, in sums of kDstate + 2 a channel. Shared memory is free.
  __device__ __forceinline__ void store_sums(float* shared, float* sums) const {
    constexpr int kOfChannel = Shape::kThreads * kChannels / Shape::kBlockD, kRow = kOfChannel + 1;
    // The threads of a channel: of its eight pieces, or of two each of sixteen.
    const int thread = static_cast<int>(threadIdx.x);
    const int at = kAlongSteps ? step / 8 : thread / (Shape::kBlockD / 2);
    float* dbias_at = shared + Shape::kBlockD * kRow;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int own_d = d + (kAlongSteps ? i * kNextRow : i);
      shared[own_d * kRow + at] = dD[i];
      dbias_at[own_d * kRow + at] = dbias[i];
    }
    __syncthreads();
    if (thread < 2 * Shape::kBlockD && thread % Shape::kBlockD < block.channels) {
      const int own_d = thread % Shape::kBlockD, which = thread / Shape::kBlockD;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kOfChannel; ++i)
        sum += shared[(which * Shape::kBlockD + own_d) * kRow + i];
      sums[block.channel(own_d) * (Shape::kDstate + 2) + Shape::kDstate + which] = sum;
    }
  }
};

}  // namespace ssmcore::cuda
