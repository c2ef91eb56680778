// One token of 3 to 32 rows through a whole Mamba layer, in 16-bit types: the tensor cores multiply
// tiles of 16 outputs with all rows while the weights stream past. Where tiles are few, the warps
// of a block, and then a cluster of blocks, split the inputs between them and add up their parts in
// a fixed order.
//
// The norm before in_proj is out_proj's of the layer before: it leaves residual times weight, and
// sums of squares from which in_proj takes the scale.
#include <cooperative_groups.h>

#include "device/async_copy.cuh"
#include "launch.h"
#include "mamba_step.cuh"

namespace ssmcore::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr const char* kOp = "mamba_step";
constexpr int kLanes = 32, kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kTile = 16;   // outputs
constexpr int kStep = 64;   // inputs that a warp takes at a time
constexpr int kStages = 4;  // steps in flight
constexpr int kMaxCluster = 8;

// A lane's 16 bytes: 8 neighbours of a row.
using Piece = Vector<uint32_t, 4>;
constexpr int kPieces = 4;  // of a lane in a step: rows g and g + 8, inputs 8 q and 32 + 8 q on
constexpr int kRingSize = kStages * kPieces * kLanes;

// The sums of a warp: parts[warp][row][output], in the memory of the rings once they are done with.
template <int kRows>
using Part = float[kRows][kTile + 1];

__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1, bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1, float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// How blocks share a product: `tiles` of outputs a block, the inputs split over what is left of its
// warps and over `cluster` blocks.
struct Split {
  int tiles, cluster;
};

// A product with a weight (outputs, inputs) whose rows have no gaps, inputs a multiple of kStep.
template <typename T, int kRows>
class Product {
 public:
  __device__ Product(const void* weight, int64_t outputs, int64_t inputs, const Split& split,
                     Piece* rings)
      : split_(split), rings_(rings), inputs_(inputs), steps_(static_cast<int>(inputs / kStep)) {
    const int parts = kWarps / split.tiles, rank = blockIdx.x % split.cluster;
    first_output_ = int64_t{blockIdx.x / split.cluster} * split.tiles * kTile;
    begin_ = rank * parts + warp() % parts;
    stride_ = split.cluster * parts;
    const int64_t first = first_output_ + warp() / parts * kTile;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t output = first + group() + 8 * j;
      exists_[j] = output < outputs;
      weight_[j] = static_cast<const T*>(weight) + (exists_[j] ? output : 0) * inputs + 8 * quad();
    }
  }

  // Has the first steps on their way.
  __device__ void start() const {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(begin_ + stage * stride_, stage);
  }

  // Multiplies with x (rows, inputs), without gaps, and calls finish(row, output, total,
  // prepare(row, output)) for the outputs of this block, or of this block's share of the rows of
  // its cluster: neighbouring threads have neighbouring outputs, 16 of one row, also of rows and
  // outputs that do not exist. What prepare() loads is on its way for several outputs at a time.
  template <typename Prepare, typename Finish>
  __device__ void run(const T* x, int rows, const Prepare& prepare, const Finish& finish) {
    float sum[kRows / 8][4] = {};
    int first_of_row[kRows / 8];  // absent rows repeat the last
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
      first_of_row[n] = min(8 * n + group(), rows - 1) * static_cast<int>(inputs_) + 8 * quad();
    Piece inputs[2]
                [kRows / 8];  // of the halves of a step, each loaded while the other is multiplied
    const auto load = [&](int step, int half) {
      if (step >= steps_) return;
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
        inputs[half][n] =
            *reinterpret_cast<const Piece*>(x + first_of_row[n] + step * kStep + 32 * half);
    };
    load(begin_, 0);
    int stage = 0;
    for (int step = begin_; step < steps_; step += stride_) {
      wait_for_copies<kStages - 1>();
      Piece w[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) w[i] = *at(stage, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load(half == 0 ? step : step + stride_, 1 - half);
        const Piece &low = w[2 * half], &high = w[2 * half + 1];  // rows g and g + 8
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; i += 2)
            multiply(sum[n], low.value[i], high.value[i], low.value[i + 1], high.value[i + 1],
                     inputs[half][n].value[i], inputs[half][n].value[i + 1], T{});
      }
      fetch(step + kStages * stride_, stage);
      stage = (stage + 1) % kStages;
    }
    share(sum);
    finish_all(prepare, finish);
  }

 private:
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / kLanes; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) % kLanes / 4; }
  __device__ static int quad() { return static_cast<int>(threadIdx.x) % 4; }

  __device__ Piece* at(int stage, int i) const {
    return rings_ + warp() * kRingSize + (stage * kPieces + i) * kLanes + threadIdx.x % kLanes;
  }

  __device__ void fetch(int step, int stage) const {
    if (step < steps_) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        copy_async_16(at(stage, i), weight_[i % 2] + step * kStep + 32 * (i / 2), exists_[i % 2]);
    }
    commit_copies();
  }

  __device__ Part<kRows>* parts() const { return reinterpret_cast<Part<kRows>*>(rings_); }

  __device__ void share(const float (&sum)[kRows / 8][4]) const {
    wait_for_copies<0>();
    __syncthreads();
    Part<kRows>& mine = parts()[warp()];
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mine[8 * n + 2 * quad() + i % 2][group() + 8 * (i / 2)] = sum[n][i];
    __syncthreads();
  }

  // This block's sum for output `o` of a tile.
  __device__ float total(int row, int tile, int o) const {
    const int count = kWarps / split_.tiles;
    float total = 0;
    for (int i = 0; i < count; ++i) total += parts()[tile * count + i][row][o];
    return total;
  }

  template <typename Prepare, typename Finish>
  __device__ void finish_all(const Prepare& prepare, const Finish& finish) const {
    const int o = threadIdx.x % kTile, outputs = split_.tiles * kTile;
    if (split_.cluster == 1) {
      constexpr int kAtOnce = kRows >= 32 ? 8 : kRows / 4;
      const int count = kRows * outputs;
      for (int first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
        decltype(prepare(0, int64_t{})) prepared[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = first + k * kThreads;
          if (i < count) prepared[k] = prepare(i / outputs, first_output_ + i % outputs);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = first + k * kThreads, row = i / outputs;
          if (i < count)
            finish(row, first_output_ + i % outputs, total(row, i % outputs / kTile, o),
                   prepared[k]);
        }
      }
      return;
    }
    // One tile: each block has its total first, then some of the rows of the cluster's.
    constexpr int kRowsAtOnce = kThreads / kTile;
    __shared__ float totals[kRows][kTile];
    for (int row = threadIdx.x / kTile; row < kRows; row += kRowsAtOnce)
      totals[row][o] = total(row, 0, o);
    const cg::cluster_group cluster = cg::this_cluster();
    const int64_t output = first_output_ + o;
    cluster.sync();
    for (int first = 0; first < kRows; first += kRowsAtOnce * split_.cluster) {
      const int row =
          first + static_cast<int>(cluster.block_rank()) * kRowsAtOnce + threadIdx.x / kTile;
      const auto prepared = prepare(row, output);
      float sum = 0;
      if (row < kRows)
        for (int rank = 0; rank < split_.cluster; ++rank)
          sum += *cluster.map_shared_rank(&totals[row][o], rank);
      finish(row, output, sum, prepared);
    }
    cluster.sync();  // before anybody's totals go
  }

  const Split split_;
  Piece* rings_;
  int64_t inputs_, first_output_;
  int steps_, begin_, stride_;
  const T* weight_[2];  // of this lane's rows
  bool exists_[2];
};

// Residual times the norm's weight, and the sum of squares of the row: what out_proj leaves for all
// layers but the first.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mamba_step_norm_kernel(const __grid_constant__ MambaStepParams p) {
  __shared__ float squares[kWarps];
  const int64_t row = blockIdx.x;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.d_model; i += kThreads) {
    const float v = p.residual[row * p.d_model + i];
    sum = fmaf(v, v, sum);
    static_cast<T*>(p.x)[row * p.d_model + i] = from_float<T>(v * p.norm[i]);
  }
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % kLanes == 0) squares[threadIdx.x / kLanes] = sum;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.d_model / kTile; i += kThreads) {
    float total = 0;
    for (int w = 0; i == 0 && w < kWarps; ++w) total += squares[w];
    p.squares[i * p.rows + row] = total;
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    mamba_step_rows_in_proj_kernel(const __grid_constant__ MambaStepParams p, Split split) {
  extern __shared__ Piece rings[];
  __shared__ float scales[kRows], sums[kThreads / kRows][kRows];
  let_next_launch_begin();
  Product<T, kRows> product(p.in_proj, 2 * p.dim, p.d_model, split, rings);
  product.start();
  wait_for_launch_before();

  const int rows = static_cast<int>(p.rows), tiles = static_cast<int>(p.d_model) / kTile;
  const int of_row = threadIdx.x % kRows;
  float sum = 0;
#pragma unroll 8
  for (int i = threadIdx.x / kRows; i < tiles; i += kThreads / kRows)
    sum += p.squares[i * rows + min(of_row, rows - 1)];
  sums[threadIdx.x / kRows][of_row] = sum;
  __syncthreads();
  if (threadIdx.x < kRows) {
    float total = 0;
    for (int i = 0; i < kThreads / kRows; ++i) total += sums[i][of_row];
    scales[of_row] = 1.0f / sqrtf(total / static_cast<float>(p.d_model) + p.eps);
  }

  const auto prepare = [&](int row, int64_t output) {
    return row < rows && output < p.dim ? Convolution<T>(p, row, static_cast<int>(output))
                                        : Convolution<T>();
  };
  const auto finish = [&](int row, int64_t output, float total, const Convolution<T>& convolution) {
    if (row >= rows || output >= 2 * p.dim) return;
    total *= scales[row];
    if (p.in_proj_bias) total += p.in_proj_bias[output];
    const T value = from_float<T>(total);
    if (output < p.dim)
      static_cast<T*>(p.u)[row * p.dim + output] = from_float<T>(convolution.next(p, value));
    else
      static_cast<T*>(p.z)[row * p.dim + output - p.dim] = value;
  };
  product.run(static_cast<const T*>(p.x), rows, prepare, finish);
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    mamba_step_rows_x_proj_kernel(const __grid_constant__ MambaStepParams p, Split split) {
  extern __shared__ Piece rings[];
  const int64_t outputs = p.dt_rank + 2 * kDstate;
  let_next_launch_begin();
  Product<T, kRows> product(p.x_proj, outputs, p.dim, split, rings);
  product.start();
  wait_for_launch_before();
  const auto finish = [&](int row, int64_t output, float total, int) {
    if (row < p.rows && output < outputs) p.delta_B_C[row * outputs + output] = rounded<T>(total);
  };
  product.run(
      static_cast<const T*>(p.u), static_cast<int>(p.rows), [](int, int64_t) { return 0; }, finish);
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    mamba_step_rows_out_proj_kernel(const __grid_constant__ MambaStepParams p, Split split) {
  extern __shared__ Piece rings[];
  let_next_launch_begin();
  Product<T, kRows> product(p.out_proj, p.d_model, p.dim, split, rings);
  product.start();
  wait_for_launch_before();
  const auto exists = [&](int row, int64_t output) { return row < p.rows && output < p.d_model; };
  const auto prepare = [&](int row, int64_t output) {
    return exists(row, output) ? p.residual[row * p.d_model + output] : 0.0f;
  };
  const auto finish = [&](int row, int64_t output, float total, float residual) {
    if (exists(row, output)) {
      if (p.out_proj_bias) total += p.out_proj_bias[output];
      const int64_t at = row * p.d_model + output;
      residual += rounded<T>(total);
      p.residual[at] = residual;
      if (p.next_norm) static_cast<T*>(p.x)[at] = from_float<T>(residual * p.next_norm[output]);
    }
    float squares = residual * residual;  // of the tile
    for (int offset = kTile / 2; offset > 0; offset /= 2)
      squares += __shfl_xor_sync(~0u, squares, offset);
    if (exists(row, output) && output % kTile == 0)
      p.squares[output / kTile * p.rows + row] = squares;
  };
  product.run(static_cast<const T*>(p.y), static_cast<int>(p.rows), prepare, finish);
}

// Blocks enough for the chip: as many tiles a block as leaves that, up to `most`; for few tiles a
// cluster each.
Split split_of(int num_sms, int64_t outputs, int64_t inputs, int most) {
  const int64_t tiles = ceil_div(outputs, kTile);
  Split split{1, 1};
  while (2 * split.tiles <= most && tiles / (2 * split.tiles) >= num_sms) split.tiles *= 2;
  const int64_t steps = inputs / kStep;
  while (split.tiles == 1 && 2 * split.cluster <= kMaxCluster &&
         tiles * split.cluster * 2 <= num_sms && steps >= 2 * split.cluster * kWarps / 4)
    split.cluster *= 2;
  return split;
}

template <typename T, int kRows>
void launch_product(void (*kernel)(MambaStepParams, Split), const MambaStepParams& p,
                    int64_t outputs, int64_t inputs, int most_tiles, const Exec& exec) {
  const Split split = split_of(exec.context.cuda().num_sms(), outputs, inputs, most_tiles);
  constexpr size_t kRingBytes = kWarps * kRingSize * sizeof(Piece);
  static_assert(kRingBytes >= kWarps * sizeof(Part<kRows>));
  Grid grid{blocks_for(outputs, kTile * split.tiles) * static_cast<unsigned>(split.cluster),
            kThreads, kRingBytes};
  grid.begins_early = true;
  grid.cluster = static_cast<unsigned>(split.cluster);
  launch_kernel(kOp, kernel, grid, exec, p, split);
}

template <typename T, int kRows>
void launch_with(const MambaStepParams& p, const Exec& exec) {
  if (p.is_first)
    launch_kernel(kOp, mamba_step_norm_kernel<T>, {blocks_for(p.rows, 1), kThreads}, exec, p);
  launch_product<T, kRows>(mamba_step_rows_in_proj_kernel<T, kRows>, p, 2 * p.dim, p.d_model, 4,
                           exec);
  launch_product<T, kRows>(mamba_step_rows_x_proj_kernel<T, kRows>, p, p.dt_rank + 2 * kDstate,
                           p.dim, 1, exec);
  launch_mamba_step_update(p, exec);
  launch_product<T, kRows>(mamba_step_rows_out_proj_kernel<T, kRows>, p, p.d_model, p.dim, 1, exec);
}

template <typename T>
void launch_with_rows(const MambaStepParams& p, const Exec& exec) {
  if (p.rows <= 8)
    launch_with<T, 8>(p, exec);
  else if (p.rows <= 16)
    launch_with<T, 16>(p, exec);
  else
    launch_with<T, 32>(p, exec);
}

}  // namespace

void launch_mamba_step_rows(const MambaStepParams& p, const Exec& exec) {
  if (p.dtype == DType::bfloat16)
    launch_with_rows<bfloat16>(p, exec);
  else
    launch_with_rows<float16>(p, exec);
}

}  // namespace ssmcore::cuda
