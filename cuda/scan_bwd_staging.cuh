// What scan_bwd_kernel.cuh does once for an element: from operands in memory to Δ, Δu, dy, B and C
// as floats in shared memory, and from what the recurrence left there to du, ddelta and dz.
#pragma once

#include "device/scan_piece.cuh"
#include "scan_bwd_scales.cuh"

namespace ssmcore::cuda {

// Of what the sums over time need.
enum class ScanBwdUse { all, states, gradients };

// threadIdx.x, for the compiler another number every time: what follows from it is to be computed
// again rather than to take a register.
__device__ __forceinline__ int opaque_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A thread's piece of B and C of a tile, as far as `kUse` needs them. Some threads have none.
template <typename T, bool kAlongSteps, ScanBwdUse kUse>
struct ScanBwdCoefficients {
  using Shape = ScanBwdShape<T>;
  using Input = Cursor<const T, kAlongSteps>;
  using Piece = typename Input::Piece;
  static constexpr int kOperands = kUse == ScanBwdUse::all ? 2 : 1;
  using Cut = PieceCut<Piece, kOperands * Shape::kDstate, Shape::kTile, Shape::kThreads>;
  static_assert(Cut::kOwn == 1);

  Piece piece;

  // What a thread has: state `n` of B (0) or C (1), from a step on.
  struct Place {
    bool exists;
    int which, n, step;
  };
  __device__ __forceinline__ static Place place() {
    const int thread = opaque_thread(), row = Cut::row(thread);
    return {thread < Cut::kPieces, kUse == ScanBwdUse::gradients ? 1 : row / Shape::kDstate,
            row % Shape::kDstate, Cut::step(thread)};
  }

  __device__ __forceinline__ void load(const SelectiveScanFwdParams& p,
                                       const ScanBwdMemory<T>& memory, int steps) {
    const auto [exists, which, n, step] = place();
    if (!exists) return;
    const bool is_B = which == 0;
    const Strided<4>& operand = is_B ? p.B : p.C;
    const char* const tile = memory.place(is_B ? ScanBwdOperand::B : ScanBwdOperand::C).at;
    const Input from{
        reinterpret_cast<const T*>(tile) + n * operand.stride[2] + step * operand.stride[3],
        operand.stride[2], operand.stride[3]};
    const bool is_whole = p.dstate == Shape::kDstate && steps == Shape::kTile && from.is_aligned();
    piece = is_whole ? from.load()
                     : Input::load_some(from, 0, 0, static_cast<int>(p.dstate) - n, steps - step);
  }

  // As floats.
  __device__ __forceinline__ void stage(const ScanBwdMemory<T>& memory,
                                        ScanBwdBounds& bounds) const {
    const auto [exists, which, n, step] = place();
    if (!exists) return;
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const Four of = {piece.get(four, 0), piece.get(four, 1), piece.get(four, 2),
                       piece.get(four, 3)};
      store_four(memory.coefficients(which, n + Piece::row(four)) + step + Piece::step(four, 0),
                 of);
#pragma unroll
      for (const float value : of.value) {
        bounds.include(ScanBwdBound::B, which == 0 ? value : 0.0f);
        bounds.include(ScanBwdBound::C, which == 1 ? value : 0.0f);
      }
    }
  }
};

// A thread's piece of a tile of a block's channels.
template <typename T, bool kAlongSteps>
struct ScanBwdTile {
  using Shape = ScanBwdShape<T>;
  using Operand = ScanBwdOperand;
  using Piece = cuda::Piece<T, kAlongSteps>;
  using Cut = PieceCut<Piece, Shape::kBlockD, Shape::kTile, Shape::kThreads>;
  static_assert(Cut::kOwn == 1);
  static constexpr int kChannels = Piece::kRows;

  struct Inputs {
    Piece delta, u, z, dout;
  };

  const SelectiveScanBwdParams& p;
  const ScanBwdMemory<T> memory;
  const int channels;  // of the block
  const int steps;
  const bool moves_vectors;  // whether pieces are whole and aligned

  const int thread = opaque_thread();

  // The piece's first channel and step.
  __device__ int d() const { return Cut::row(thread); }
  __device__ int step() const { return Cut::step(thread); }

  template <ScanBwdUse kUse>
  __device__ __forceinline__ Inputs load() const {
    // The loads of one branch need not wait for one another.
    return moves_vectors ? load_all<kUse, true>() : load_all<kUse, false>();
  }

  // Leaves Δ, Δu and dy, as far as `kUse` needs them.
  template <ScanBwdUse kUse>
  __device__ __forceinline__ void stage(const Inputs& inputs, ScanBwdBounds& bounds) const {
    const SelectiveScanFwdParams& fwd = p.fwd;
    float value[8];
    for_each([&](int j) { value[j] = get(inputs.delta, j) + memory.bias(d() + channel(j)); });
    if (fwd.delta_softplus) for_each([&](int j) { value[j] = softplus(value[j]); });
    // What does not exist leaves the states as they are.
    if (steps < Shape::kTile || channels < Shape::kBlockD)
      for_each([&](int j) {
        if (d() + channel(j) >= channels || step_of(j) >= steps) value[j] = 0;
      });
    store_plane(value, [&](int r) { return memory.delta(r); });
    for_each([&](int j) { bounds.include(ScanBwdBound::delta, value[j]); });
    if (kUse != ScanBwdUse::gradients) {
      for_each([&](int j) { value[j] *= get(inputs.u, j); });
      store_plane(value, [&](int r) { return memory.delta_u(r); });
      for_each([&](int j) { bounds.include(ScanBwdBound::delta_u, value[j]); });
    }
    if (kUse != ScanBwdUse::states) {
      for_each([&](int j) { value[j] = get(inputs.dout, j); });
      if (fwd.z.data) for_each([&](int j) { value[j] *= silu(get(inputs.z, j)); });
      store_plane(value, [&](int r) { return memory.dy(r); });
      for_each([&](int j) { bounds.include(ScanBwdBound::dy, value[j]); });
    }
  }

  // From y: dz, if there is z. Leaves the piece of dy in `dy`.
  __device__ __forceinline__ void finish_gate(const Inputs& inputs, float (&dy)[8]) const {
    for_each([&](int j) { dy[j] = get(inputs.dout, j); });
    if (!p.fwd.z.data) return;
    float dz[8];
    load_plane(dz, [&](int r) { return memory.y(r); });
    for_each([&](int j) {
      const float y = dz[j] + memory.D(d() + channel(j)) * get(inputs.u, j);
      const float z = get(inputs.z, j), opening = sigmoid(z), opened = dy[j] * opening;
      dy[j] = opened * z;
      dz[j] = y * (opened + dy[j] * (1.0f - opening));
    });
    store(Operand::dz, p.dz, vectors_at(Operand::dz, p.dz), dz);
  }

  // From the gradients of Δu, and of Δ by way of the decay: du and ddelta. Adds to the sums over
  // time, of each of the piece's channels: dD, and then ddelta_bias.
  __device__ __forceinline__ void finish(const Piece& u, float (&dy)[8]) const {
    T* const du_at = vectors_at(Operand::du, p.du);
    T* const ddelta_at = vectors_at(Operand::ddelta, p.ddelta);
    float dx[8], delta[8], ddelta[8], du[8];
    load_plane(dx, [&](int r) { return memory.dx(r); });
    load_plane(delta, [&](int r) { return memory.delta(r); });
    load_plane(ddelta, [&](int r) { return memory.by_decay(r); });
    Four sums = load_four(memory.thread_sums());
    for_each([&](int j) {
      du[j] = delta[j] * dx[j] + memory.D(d() + channel(j)) * dy[j];
      ddelta[j] = get(u, j) * dx[j] + kLn2 * ddelta[j];
    });
    // The derivative of softplus, by its result.
    if (p.fwd.delta_softplus) for_each([&](int j) { ddelta[j] *= one_minus_exp(delta[j]); });
    for_each([&](int j) {
      // Beyond the last step nothing was left in shared memory.
      if (step_of(j) >= steps) return;
      sums.value[channel(j)] += dy[j] * get(u, j);
      sums.value[2 + channel(j)] += ddelta[j];
    });
    store_four(memory.thread_sums(), sums);
    store(Operand::du, p.du, du_at, du);
    store(Operand::ddelta, p.ddelta, ddelta_at, ddelta);
  }

  // The threads that have pieces of channel `channel`, and which of theirs it is.
  template <typename Function>
  __device__ __forceinline__ static void for_each_thread_of(int channel, const Function& function) {
#pragma unroll
    for (int i = 0; i < Cut::kAlong; ++i)
      if constexpr (kAlongSteps)
        function(channel / 8 * (8 * Cut::kAlong) + i * 8 + channel % 8, 0);
      else
        function(i * Cut::kAcross + channel / 2, channel % 2);
  }

 private:
  // Of element j, four of which are neighbours in time: the channel, from the first one, and the
  // step.
  __device__ static constexpr int channel(int j) { return Piece::row(j / 4); }
  __device__ int step_of(int j) const { return step() + Piece::step(j / 4, j % 4); }
  __device__ __forceinline__ static float get(const Piece& piece, int j) {
    return piece.get(j / 4, j % 4);
  }

  // Where the piece begins, if it is moved as vectors: these have neighbours in the faster
  // dimension, and no long strides.
  template <typename Operands>
  __device__ __forceinline__ T* vectors_at(Operand operand, const Operands& strides) const {
    const int offset = kAlongSteps ? d() * static_cast<int>(strides.stride[2]) + step()
                                   : step() * static_cast<int>(strides.stride[3]) + d();
    return reinterpret_cast<T*>(memory.place(operand).at) + offset;
  }
  template <typename Pointer>
  __device__ __forceinline__ Cursor<Pointer, kAlongSteps> cursor(Operand operand,
                                                                 const Strided<4>& strides) const {
    const int64_t stride_d = strides.stride[2], stride_t = strides.stride[3];
    Pointer* const tile = reinterpret_cast<Pointer*>(memory.place(operand).at);
    return {tile + d() * stride_d + step() * stride_t, stride_d, stride_t};
  }

  template <bool kVectors>
  __device__ __forceinline__ Piece load(Operand operand, const Strided<4>& strides) const {
    using Input = Cursor<const T, kAlongSteps>;
    if constexpr (kVectors)
      return Input{vectors_at(operand, strides), strides.stride[2], strides.stride[3]}.load();
    else
      return Input::load_some(cursor<const T>(operand, strides), 0, 0, channels - d(),
                              steps - step());
  }
  template <ScanBwdUse kUse, bool kVectors>
  __device__ __forceinline__ Inputs load_all() const {
    Inputs inputs{};
    if (kVectors && d() >= channels) return inputs;
    inputs.delta = load<kVectors>(Operand::delta, p.fwd.delta);
    if (kUse != ScanBwdUse::gradients) inputs.u = load<kVectors>(Operand::u, p.fwd.u);
    if (kUse == ScanBwdUse::states) return inputs;
    inputs.dout = load<kVectors>(Operand::dout, p.dout);
    if (p.fwd.z.data) inputs.z = load<kVectors>(Operand::z, p.fwd.z);
    return inputs;
  }

  // `vectors` is where vectors begin.
  __device__ __forceinline__ void store(Operand operand, const StridedGradient<4>& gradient,
                                        T* vectors, const float (&value)[8]) const {
    using Output = Cursor<T, kAlongSteps>;
    if (!gradient.data) return;
    float in_order[8];
    for_each([&](int j) { in_order[Piece::index(j / 4, j % 4)] = value[j]; });
    if (gradient.accumulate) {
      const Piece before = load<false>(operand, gradient);
      for_each([&](int j) { in_order[Piece::index(j / 4, j % 4)] += get(before, j); });
    }
    Piece piece;
    piece.set(in_order);
    if (!moves_vectors)
      Output::store_some(cursor<T>(operand, gradient), 0, 0, channels - d(), steps - step(), piece);
    else if (d() < channels)
      Output{vectors, gradient.stride[2], gradient.stride[3]}.store(0, 0, piece);
  }

  template <typename Function>
  __device__ __forceinline__ static void for_each(const Function& function) {
#pragma unroll
    for (int j = 0; j < 8; ++j) function(j);
  }
  // Where the piece's four of a plane is, whose rows `row_of` gives.
  template <typename Row>
  __device__ __forceinline__ float* at(const Row& row_of, int four) const {
    const int row = kAlongSteps ? d() : d() / 2 + four * (Shape::kBlockD / 2);
    return row_of(row) + step_of(4 * four);
  }
  template <typename Row>
  __device__ __forceinline__ void store_plane(const float (&value)[8], const Row& row_of) const {
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const float* const of = value + 4 * four;
      store_four(at(row_of, four), {of[0], of[1], of[2], of[3]});
    }
  }
  template <typename Row>
  __device__ __forceinline__ void load_plane(float (&value)[8], const Row& row_of) const {
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const Four of = load_four(at(row_of, four));
#pragma unroll
      for (int j = 0; j < 4; ++j) value[4 * four + j] = of.value[j];
    }
  }
};

// What a block has for all tiles.
template <typename T>
__device__ __forceinline__ void begin_block(const ScanBwdBlock<T>& block) {
  const SelectiveScanFwdParams& p = block.p.fwd;
  store_four(block.memory.thread_sums(), {});
  const int d = static_cast<int>(threadIdx.x);
  if (d >= ScanBwdShape<T>::kBlockD) return;
  const auto load = [&](const Strided<2>& of) {
    return of.data && d < block.channels ? float_at(of, block.head, block.first_d + d) : 0.0f;
  };
  block.memory.bias(d) = load(p.delta_bias);
  block.memory.D(d) = load(p.D);
}

// And for the tiles of a row: `first_state` is that of chunk_states before the row's first tile.
// Inputs begin at tile `tile`, and outputs `direction` (1 or -1), which is the way, before. Between
// barriers.
template <typename T>
__device__ __forceinline__ void begin_row(const ScanBwdBlock<T>& block, const ScanBwdPlan& plan,
                                          const ScanRow& row, int64_t first_state, int64_t tile,
                                          int direction) {
  if (threadIdx.x != 0) return;
  const SelectiveScanFwdParams& fwd = block.p.fwd;
  const auto begin = [&](ScanBwdOperand operand, const void* data, size_t size, int64_t at,
                         int64_t step, int64_t tile) {
    const int64_t bytes = static_cast<int64_t>(size);
    char* const first = const_cast<char*>(static_cast<const char*>(data)) + at * bytes;
    block.memory.place(operand) = {first + tile * step * bytes, direction * step * bytes};
  };
  const auto begin_steps = [&](ScanBwdOperand operand, const Strided<4>& of, int64_t head_or_group,
                               int64_t r, int64_t tile) {
    begin(operand, of.data, sizeof(T),
          row.batch * of.stride[0] + head_or_group * of.stride[1] + r * of.stride[2] +
              row.begin * of.stride[3],
          plan.tile_l * of.stride[3], tile);
  };
  const auto begin_input = [&](ScanBwdOperand operand, const Strided<4>& of) {
    begin_steps(operand, of, block.head, block.first_d, tile);
  };
  const auto begin_output = [&](ScanBwdOperand operand, const Strided<4>& of) {
    begin_steps(operand, of, block.head, block.first_d, tile - direction);
  };
  begin_input(ScanBwdOperand::u, fwd.u);
  begin_input(ScanBwdOperand::delta, fwd.delta);
  begin_input(ScanBwdOperand::z, fwd.z);
  begin_input(ScanBwdOperand::dout, block.p.dout);
  begin_output(ScanBwdOperand::du, block.p.du);
  begin_output(ScanBwdOperand::ddelta, block.p.ddelta);
  begin_output(ScanBwdOperand::dz, block.p.dz);
  const int64_t group = block.head / (fwd.nheads / fwd.ngroups);
  begin_steps(ScanBwdOperand::B, fwd.B, group, 0, tile);
  begin_steps(ScanBwdOperand::C, fwd.C, group, 0, tile);
  const int64_t* const stride = fwd.chunk_states.stride;
  begin(ScanBwdOperand::states, fwd.chunk_states.data, sizeof(float),
        row.batch * stride[0] + first_state * stride[1] + block.head * stride[2] +
            block.first_d * stride[3],
        plan.chunks_per_tile * stride[1], tile);
}

// The same for what the block adds to dB and dC.
template <typename T>
__device__ __forceinline__ void begin_products(const ScanBwdBlock<T>& block,
                                               const ScanBwdPlan& plan, const ScanRow& row,
                                               float* products, int64_t tile, int direction) {
  constexpr int64_t kOfStep = 2 * ScanBwdShape<T>::kDstate;
  if (threadIdx.x != 0) return;
  const SelectiveScanFwdParams& fwd = block.p.fwd;
  const int64_t batch = fwd.cu_seqlens.data ? 1 : fwd.rows;
  const int64_t blocks = block.head * plan.blocks_d + block.first_d / ScanBwdShape<T>::kBlockD;
  const int64_t t = row.begin + (tile - direction) * plan.tile_l;
  float* const first = products + ((blocks * batch + row.batch) * fwd.seqlen + t) * kOfStep;
  block.memory.place(ScanBwdOperand::products) = {
      reinterpret_cast<char*>(first),
      direction * plan.tile_l * kOfStep * static_cast<int64_t>(sizeof(float))};
}

// Leaves the block's dD and ddelta_bias, by the sums of each thread, in `to`, kDstate + 2 a
// channel.
template <typename T, bool kAlongSteps>
__device__ __forceinline__ void store_sums(const ScanBwdBlock<T>& block, float* to) {
  using Shape = ScanBwdShape<T>;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= 2 * Shape::kBlockD || thread % Shape::kBlockD >= block.channels) return;
  const int d = thread % Shape::kBlockD, which = thread / Shape::kBlockD;
  float sum = 0;
  ScanBwdTile<T, kAlongSteps>::for_each_thread_of(
      d, [&](int of, int own) { sum += block.memory.thread_sums(of)[2 * which + own]; });
  to[block.channel(d) * (Shape::kDstate + 2) + Shape::kDstate + which] = sum;
}

}  // namespace ssmcore::cuda
