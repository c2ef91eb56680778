// The selective scan with real A and varying B and C.
//
// A block takes kChannels · kScanThreads / lanes channels of one row. Its time is cut into tiles,
// which pass through a pipeline of three stages, a barrier apart:
//
//   1. kStagingThreads threads load a tile, and leave Δ, Δu, B and C in shared memory as floats.
//   2. kScanThreads threads run the recurrence, serially in time. The states of a channel are
//      spread over `lanes` neighbouring threads, kStates each; each thread has kChannels channels,
//      so that what it reads of B and C serves several. What a lane adds to y replaces Δu, Δ, …
//   3. The staging threads sum what the lanes left, add D u, gate with z and store the tile.
//
// Stages 1 and 3 overlap with stage 2 of the tile between: they wait for memory, and it does not.
// Shared memory holds rows of channels (or states) by steps, so four steps are read at once.
#pragma once

#include "../cpp/src/selective_scan_params.h"
#include "device/fault.cuh"
#include "device/math.cuh"
#include "device/scan_piece.cuh"

namespace ssmcore::cuda {

inline constexpr int kScanThreads = 128, kStagingThreads = 128;

struct ScanShape {
  int channels, states;  // of one thread
  int lanes;             // threads that share a channel's states
  int block_l;           // steps of a tile, a multiple of 8

  __host__ __device__ int block_d() const { return channels * kScanThreads / lanes; }
  __host__ __device__ int row_floats() const { return block_l + 4; }  // no bank conflicts
  __host__ __device__ int channel_rows() const { return block_d() * (lanes < 2 ? 2 : lanes); }
  __host__ __device__ int stage_floats() const {
    return (channel_rows() + 2 * states * lanes) * row_floats();
  }
  __host__ __device__ size_t shared_bytes() const { return 2 * sizeof(float) * stage_floats(); }
};

namespace {

struct Tile {
  int64_t begin = 0;
  int steps = 0;
  int64_t chunk_end = 0;
};

// The tiles of a row: none reaches over the end of a chunk.
struct Tiles {
  int64_t length, chunk_size;
  int block_l;

  __device__ Tile first() const { return at(0, min(chunk_size, length)); }
  __device__ Tile after(const Tile& tile) const {
    const int64_t begin = tile.begin + tile.steps;
    return at(begin, begin == tile.chunk_end ? min(begin + chunk_size, length) : tile.chunk_end);
  }
  __device__ Tile at(int64_t begin, int64_t chunk_end) const {
    return {begin, static_cast<int>(min(static_cast<int64_t>(block_l), chunk_end - begin)),
            chunk_end};
  }
};

struct alignas(16) Four {
  float value[4];
};

__device__ __forceinline__ Four load_four(const float* from) {
  return *reinterpret_cast<const Four*>(from);
}

__device__ __forceinline__ void store_four(float* to, const Four& four) {
  *reinterpret_cast<Four*>(to) = four;
}

// One row's part of the work, and where its operands are.
struct Row {
  int64_t index, batch, begin, length, slot, first_chunk;
};

template <typename T>
struct Block {
  const SelectiveScanFwdParams& p;
  const ScanShape& shape;
  float* shared;
  Row row;
  int64_t head, first_d;
  int channels;  // of this block

  __device__ float* stage(int64_t tile) const {
    return shared + (tile % 2) * shape.stage_floats();
  }
  // Row `r` of Δ (part 0) or Δu (part 1) in a stage; also of what lane 1 - part, or `part` from 2
  // on, adds to y.
  __device__ float* cells(float* stage, int part, int r) const {
    return stage + (part * shape.block_d() + r) * shape.row_floats();
  }
  __device__ int lane_part(int lane) const { return lane < 2 ? 1 - lane : lane; }
  __device__ float* coefficients(float* stage) const {
    return stage + shape.channel_rows() * shape.row_floats();
  }

  // Neighbouring channels lie half the rows apart where they are staged in pairs.
  __device__ bool along_steps() const { return p.u.stride[3] == 1 || p.u.stride[2] != 1; }
  __device__ int channel_of(int r) const {
    const int half = shape.block_d() / 2;
    return along_steps() ? r : 2 * (r % half) + r / half;
  }

  template <typename U>
  __device__ Plane<U> plane(const Strided<4>& operand, int64_t at1, int64_t at2, int which_row,
                            bool along) const {
    Plane<U> plane{static_cast<U*>(operand.data), operand.stride[which_row], operand.stride[3],
                   false};
    if (!operand.data) return plane;
    plane.data += row.batch * operand.stride[0] + at1 * operand.stride[1] +
                  at2 * operand.stride[2] + row.begin * operand.stride[3];
    plane.vectors = vectors_fit(plane, along, p.chunk_size % 8 == 0);
    return plane;
  }

  __device__ Tiles tiles() const {
    return {row.length, p.chunk_states.data ? p.chunk_size : row.length, shape.block_l};
  }
};

// --- Staging --------------------------------------------------------------------------------------

template <typename T>
struct Staging {
  const Block<T>& block;
  const SelectiveScanFwdParams& p;
  const ScanShape& shape;
  const bool along;
  const int thread, pieces;
  Plane<const T> u, delta, z, B, C;
  Plane<T> out;
  bool along_B, along_C;

  __device__ Staging(const Block<T>& block, int thread)
      : block(block),
        p(block.p),
        shape(block.shape),
        along(block.along_steps()),
        thread(thread),
        pieces(shape.block_d() * shape.block_l / 8) {
    const int64_t group = block.head / (p.nheads / p.ngroups);
    u = block.template plane<const T>(p.u, block.head, block.first_d, 2, along);
    delta = block.template plane<const T>(p.delta, block.head, block.first_d, 2, along);
    z = block.template plane<const T>(p.z, block.head, block.first_d, 2, along);
    out = block.template plane<T>(p.out, block.head, block.first_d, 2, along);
    along_B = p.B.stride[3] == 1 || p.B.stride[2] != 1;
    along_C = p.C.stride[3] == 1 || p.C.stride[2] != 1;
    B = block.template plane<const T>(p.B, group, 0, 2, along_B);
    C = block.template plane<const T>(p.C, group, 0, 2, along_C);
  }

  // First row of shared memory and step of a piece, and the rows between its two fours.
  struct Place {
    int channel, row, t, row_stride, t_stride;
  };
  __device__ Place place(int piece) const {
    if (along) {
      const int per_row = shape.block_l / 8;
      return {piece / per_row, piece / per_row, piece % per_row * 8, 0, 4};
    }
    const int half = shape.block_d() / 2;
    return {piece % half * 2, piece % half, piece / half * 4, half, 0};
  }

  __device__ void load(const Plane<const T>& plane, const Tile& tile, int piece,
                       Piece<T>& loaded) const {
    const Place at = place(piece);
    load_piece(plane, along, at.channel, tile.begin + at.t, block.channels - at.channel,
               tile.steps - at.t, loaded);
  }

  __device__ void run() {
    const Tiles tiles = block.tiles();
    Tile before{}, finished{}, staged{}, next = tiles.first();
    Piece<T> piece_u, piece_delta, end_u, end_z;
    load(u, next, thread, piece_u);
    load(delta, next, thread, piece_delta);
    for (int64_t i = 0;; ++i) {
      before = finished;
      finished = staged;
      staged = next;
      if (staged.steps == 0 && finished.steps == 0 && before.steps == 0) break;
      next = tiles.after(staged);
      float* stage = block.stage(i);
      for (int piece = thread; piece < pieces; piece += kStagingThreads) {
        const bool last = piece + kStagingThreads >= pieces;
        const int next_piece = last ? thread : piece + kStagingThreads;
        if (before.steps > 0) finish(stage, before, piece, end_u, end_z);
        if (finished.steps > 0 || !last) {
          load(u, last ? finished : before, next_piece, end_u);
          if (p.z.data) load(z, last ? finished : before, next_piece, end_z);
        }
        if (staged.steps > 0) {
          convert(stage, staged, piece, piece_u, piece_delta);
          load(u, last ? next : staged, next_piece, piece_u);
          load(delta, last ? next : staged, next_piece, piece_delta);
        }
      }
      if (staged.steps > 0) {
        float* coefficients = block.coefficients(stage);
        stage_coefficients(B, along_B, staged, coefficients);
        stage_coefficients(C, along_C, staged,
                           coefficients + shape.states * shape.lanes * shape.row_floats());
      }
      if (staged.steps > 0 || finished.steps > 0) __syncthreads();
    }
  }

  __device__ void convert(float* stage, const Tile& tile, int piece, Piece<T>& piece_u,
                          Piece<T>& piece_delta) const {
    const Place at = place(piece);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.row + half * at.row_stride, t = at.t + half * at.t_stride;
      const int d = at.channel + (along ? 0 : half);
      const float bias =
          p.delta_bias.data && d < block.channels
              ? static_cast<const float*>(
                    p.delta_bias.data)[block.head * p.delta_bias.stride[0] +
                                       (block.first_d + d) * p.delta_bias.stride[1]]
              : 0.0f;
      Four dt, dt_u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = to_float(piece_delta.value[4 * half + i]) + bias;
        dt.value[i] = p.delta_softplus ? softplus(x) : x;
        if (t + i >= tile.steps) dt.value[i] = 0;  // such a step leaves the states as they are
        dt_u.value[i] = dt.value[i] * to_float(piece_u.value[4 * half + i]);
      }
      store_four(block.cells(stage, 0, r) + t, dt);
      store_four(block.cells(stage, 1, r) + t, dt_u);
    }
  }

  __device__ void finish(float* stage, const Tile& tile, int piece, Piece<T>& piece_u,
                         Piece<T>& piece_z) const {
    const Place at = place(piece);
    Piece<T> piece_out;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.row + half * at.row_stride, t = at.t + half * at.t_stride;
      const int d = at.channel + (along ? 0 : half);
      Four y = load_four(block.cells(stage, 1, r) + t);
      for (int lane = 1; lane < shape.lanes; ++lane) {
        const Four more = load_four(block.cells(stage, block.lane_part(lane), r) + t);
#pragma unroll
        for (int i = 0; i < 4; ++i) y.value[i] += more.value[i];
      }
      const float D =
          p.D.data && d < block.channels
              ? static_cast<const float*>(p.D.data)[block.head * p.D.stride[0] +
                                                    (block.first_d + d) * p.D.stride[1]]
              : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value = y.value[i];
        if (p.D.data) value += D * to_float(piece_u.value[4 * half + i]);
        if (p.z.data) value *= silu(to_float(piece_z.value[4 * half + i]));
        piece_out.value[4 * half + i] = from_float<T>(value);
      }
    }
    store_piece(out, along, at.channel, tile.begin + at.t, block.channels - at.channel,
                tile.steps - at.t, piece_out);
  }

  // B or C of a tile, (dstate, steps), as floats; 0 for states there are not.
  __device__ void stage_coefficients(const Plane<const T>& plane, bool along, const Tile& tile,
                                     float* to) const {
    const int rows = shape.states * shape.lanes, per_row = shape.block_l / 8;
    for (int piece = thread; piece < rows * per_row; piece += kStagingThreads) {
      const int pairs = rows / 2;
      const int n = along ? piece / per_row : piece % pairs * 2;
      const int t = along ? piece % per_row * 8 : piece / pairs * 4;
      Piece<T> loaded;
      load_piece(plane, along, n, tile.begin + t, p.dstate - n, tile.steps - t, loaded);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Four four;
#pragma unroll
        for (int i = 0; i < 4; ++i) four.value[i] = to_float(loaded.value[4 * half + i]);
        store_four(to + (n + (along ? 0 : half)) * shape.row_floats() + t + (along ? 4 * half : 0),
                   four);
      }
    }
  }
};

// --- Recurrence -----------------------------------------------------------------------------------

template <typename T, int kChannels, int kStates, int kPolynomials>
struct Recurrence {
  const Block<T>& block;
  const SelectiveScanFwdParams& p;
  const ScanShape& shape;
  const int lane, group;
  float A[kChannels][kStates], h[kChannels][kStates], delta_sum[kChannels], lost[kChannels];

  __device__ Recurrence(const Block<T>& block, int thread)
      : block(block),
        p(block.p),
        shape(block.shape),
        lane(thread % shape.lanes),
        group(thread / shape.lanes) {}

  __device__ int row(int k) const { return group + k * (shape.block_d() / kChannels); }
  __device__ int state(int s) const { return lane + s * shape.lanes; }

  template <typename Body>
  __device__ void for_each_state(const Body& body) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int d = block.channel_of(row(k));
#pragma unroll
      for (int s = 0; s < kStates; ++s)
        body(block.first_d + d, state(s), d < block.channels && state(s) < p.dstate, k, s);
    }
  }

  __device__ void store_states(float* to, int64_t stride_d, int64_t stride_n) {
    for_each_state([&](int64_t d, int n, bool exists, int k, int s) {
      if (exists) to[d * stride_d + n * stride_n] = h[k][s];
    });
  }

  __device__ void load() {
    const float* from_A = static_cast<const float*>(p.A.data) + block.head * p.A.stride[0];
    const bool starts = p.initial_state.data && block.row.slot >= 0;
    const float* from_h = static_cast<const float*>(p.initial_state.data) +
                          (starts ? block.row.slot * p.initial_state.stride[0] +
                                        block.head * p.initial_state.stride[1]
                                  : 0);
    for_each_state([&](int64_t d, int n, bool exists, int k, int s) {
      A[k][s] = exists ? from_A[d * p.A.stride[1] + n * p.A.stride[2]] * kLog2e : 0.0f;
      h[k][s] = exists && starts
                    ? from_h[d * p.initial_state.stride[2] + n * p.initial_state.stride[3]]
                    : 0.0f;
    });
#pragma unroll
    for (int k = 0; k < kChannels; ++k) delta_sum[k] = lost[k] = 0;
  }

  __device__ void run() {
    const Tiles tiles = block.tiles();
    load();
    int64_t chunk = block.row.first_chunk;
    if (block.row.length > 0) __syncthreads();
    int64_t i = 0;
    for (Tile tile = tiles.first(); tile.steps > 0; tile = tiles.after(tile), ++i) {
      advance(block.stage(i), tile.steps);
      if (p.chunk_states.data && tile.begin + tile.steps == tile.chunk_end && chunk < p.chunks)
        store_states(static_cast<float*>(p.chunk_states.data) +
                         block.row.batch * p.chunk_states.stride[0] +
                         chunk++ * p.chunk_states.stride[1] + block.head * p.chunk_states.stride[2],
                     p.chunk_states.stride[3], p.chunk_states.stride[4]);
      __syncthreads();
    }
    if (p.last_state.data && block.row.slot >= 0)
      store_states(static_cast<float*>(p.last_state.data) +
                       block.row.slot * p.last_state.stride[0] +
                       block.head * p.last_state.stride[1],
                   p.last_state.stride[2], p.last_state.stride[3]);
    if (p.delta_sum.data && lane == 0)
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const int d = block.channel_of(row(k));
        if (d < block.channels)
          static_cast<float*>(
              p.delta_sum.data)[block.row.index * p.delta_sum.stride[0] +
                                block.head * p.delta_sum.stride[1] +
                                (block.first_d + d) * p.delta_sum.stride[2]] = delta_sum[k];
      }
  }

  __device__ void advance(float* stage, int steps) {
    const int row_floats = shape.row_floats();
    const float* B = block.coefficients(stage) + lane * row_floats;
    const float* C = B + shape.lanes * kStates * row_floats;
    for (int t = 0; t < steps; t += 4) {
      Four dt[kChannels], dt_u[kChannels], y[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        dt[k] = load_four(block.cells(stage, 0, row(k)) + t);
        dt_u[k] = load_four(block.cells(stage, 1, row(k)) + t);
        y[k] = {};
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        const Four B_s = load_four(B + s * shape.lanes * row_floats + t);
        const Four C_s = load_four(C + s * shape.lanes * row_floats + t);
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float x = dt[k].value[i] * A[k][s];
            const float a = s % 8 >= 8 - kPolynomials ? exp2_polynomial(x) : exp2_approx(x);
            h[k][s] = a * h[k][s] + dt_u[k].value[i] * B_s.value[i];
            y[k].value[i] += C_s.value[i] * h[k][s];
          }
      }
      if (p.delta_sum.data) add_deltas(dt);
      __syncwarp();  // the lanes have read what is now overwritten
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        store_four(block.cells(stage, block.lane_part(lane), row(k)) + t, y[k]);
    }
  }

  // Kahan's summation: a million tiles lose no more than one.
  __device__ void add_deltas(const Four (&dt)[kChannels]) {
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
  Row row{index, index, 0, p.seqlen, index, 0};
  if (p.cu_seqlens.data) {
    const int* cu_seqlens = static_cast<const int*>(p.cu_seqlens.data);
    const auto boundary = [&](int64_t i) -> int64_t { return cu_seqlens[i * p.cu_seqlens.stride[0]]; };
    const int64_t begin = boundary(index), end = boundary(index + 1);
    const bool fits = 0 <= begin && begin <= end && end <= p.seqlen &&
                      (index > 0 || begin == 0) && (index + 1 < p.rows || end == p.seqlen);
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

template <typename T, int kChannels, int kStates, int kPolynomials>
__global__ void __launch_bounds__(kScanThreads + kStagingThreads)
    selective_scan_fwd_kernel(SelectiveScanFwdParams p, ScanShape shape, uint32_t* faults) {
  extern __shared__ __align__(16) float shared[];
  const int block_d = shape.block_d();
  const int64_t blocks_per_head = (p.headdim + block_d - 1) / block_d;
  const int64_t at = blockIdx.x / blocks_per_head;
  const int64_t first_d = blockIdx.x % blocks_per_head * block_d;
  const Block<T> block{p,
                       shape,
                       shared,
                       row_at(p, at / p.nheads, faults),
                       at % p.nheads,
                       first_d,
                       static_cast<int>(min(static_cast<int64_t>(block_d), p.headdim - first_d))};
  const int thread = threadIdx.x;
  if (thread < kScanThreads)
    Recurrence<T, kChannels, kStates, kPolynomials>(block, thread).run();
  else
    Staging<T>(block, thread - kScanThreads).run();
}

}  // namespace
}  // namespace ssmcore::cuda
