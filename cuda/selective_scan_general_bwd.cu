// The backward of the selective scan in full generality: real or complex A, constant or varying B
// and C, any option, any type. Segment after segment, the last first, a block goes back over some
// rows' steps with some tiles of channels, one after the other.
#include <string>
#include <type_traits>

#include "general_bwd_sums.cuh"
#include "launch.h"
#include "selective_scan.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

constexpr int kThreads = GeneralBwdShape::kThreads;

template <typename Real>
__device__ TileStaging<Real> staging_of(const GeneralBwdShape& s) {
  extern __shared__ __align__(32) unsigned char memory[];
  return {reinterpret_cast<Real*>(memory), s};
}

// The states where segments begin. A block has a tile of a row.
template <typename T, bool kComplex>
__global__ void __launch_bounds__(kThreads, 4) selective_scan_general_bwd_starts_kernel(
    const __grid_constant__ SelectiveScanBwdParams p, const __grid_constant__ GeneralBwdShape s,
    const __grid_constant__ GeneralBwdMemory<RealOf<T>> memory, uint32_t* faults) {
  const TileStaging<RealOf<T>> staging = staging_of<RealOf<T>>(s);
  const int64_t tiles = p.fwd.nheads * s.tiles;
  for (int64_t task = blockIdx.x; task < p.fwd.rows * tiles; task += gridDim.x) {
    const int64_t index = task % tiles;
    TileBackward<T, kComplex> tile(p, s, memory, staging, index / s.tiles, index % s.tiles);
    tile.find_segment_starts(scan_row(p.fwd, task / tiles, faults));
  }
}

// How many packed rows end at step `t` or before.
__device__ int64_t rows_to(const SelectiveScanFwdParams& p, int64_t t) {
  int64_t low = 0, high = p.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (index_at(p.cu_seqlens, middle + 1) <= t)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The rows that have steps in a segment; those without steps belong to that in which they end.
struct Rows {
  int64_t begin, end;
};
__device__ Rows rows_of(const SelectiveScanFwdParams& p, const Segment& segment) {
  if (p.cu_seqlens.data == nullptr) return {0, p.rows};
  const int64_t begin = segment.begin > 0 ? rows_to(p, segment.begin) : 0;
  int64_t end = rows_to(p, segment.end);
  if (end < p.rows && index_at(p.cu_seqlens, end) < segment.end) ++end;
  return {begin, end};
}

// A block has a slice of a head's channels and of the segment's rows.
template <typename T, bool kComplex>
__global__ void __launch_bounds__(kThreads, 4)
    selective_scan_general_bwd_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                                      const __grid_constant__ GeneralBwdShape s,
                                      const __grid_constant__ GeneralBwdMemory<RealOf<T>> memory,
                                      const __grid_constant__ Segment segment, uint32_t* faults) {
  const TileStaging<RealOf<T>> staging = staging_of<RealOf<T>>(s);
  const int64_t slices = p.fwd.nheads * s.slices;
  const Rows rows = rows_of(p.fwd, segment);
  const int64_t slice_rows = (rows.end - rows.begin + s.row_slices - 1) / s.row_slices;
  for (int64_t task = blockIdx.x; task < s.row_slices * slices; task += gridDim.x) {
    const int64_t row_slice = task / slices, slice = task % slices;
    const int64_t first_row = rows.begin + row_slice * slice_rows;
    const int64_t first_tile = slice % s.slices * s.slice_tiles;
    for (int64_t tile_at = first_tile; tile_at < min(first_tile + s.slice_tiles, s.tiles);
         ++tile_at) {
      TileBackward<T, kComplex> tile(p, s, memory, staging, slice / s.slices, tile_at);
      for (int64_t at = first_row; at < min(first_row + slice_rows, rows.end); ++at) {
        const ScanRow row = scan_row(p.fwd, at, faults);
        if (row.begin < row.end || row.slot >= 0)
          tile.run(row, segment, slice, tile_at == first_tile);
      }
      tile.store_sums(row_slice, segment.index == s.segments - 1);
    }
  }
}

int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

GeneralBwdShape shape_of(const SelectiveScanBwdParams& p, const Context& context) {
  if (p.fwd.dstate > GeneralBwdShape::kMaxStates)
    throw Error(ErrorCode::unsupported, "selective_scan_bwd: dstate is " +
                                            std::to_string(p.fwd.dstate) +
                                            ", on CUDA devices it is at most " +
                                            std::to_string(GeneralBwdShape::kMaxStates));
  return {p, context.cuda().num_sms(), context.batch_invariant()};
}

// function(null pointer to the activation type, whether A is complex)
template <typename Function>
void with_scan_type(const SelectiveScanFwdParams& p, const Function& function) {
  if (p.dtype == DType::float64) return function(static_cast<double*>(nullptr), std::false_type());
  with_type(p.dtype, [&](auto* type) {
    with_bool(p.complex, [&](auto is_complex) { function(type, is_complex); });
  });
}

template <typename T, bool kComplex>
void run(const SelectiveScanBwdParams& p, const GeneralBwdShape& s, const Exec& exec) {
  using Real = RealOf<T>;
  constexpr const char* kOp = "selective_scan_bwd";
  Scratch scratch(exec.workspace);
  const GeneralBwdMemory<Real> memory(p, s, scratch);
  const size_t shared = TileStaging<Real>::bytes(s);
  uint32_t* const faults = exec.context.cuda().faults();
  const int64_t tiles = p.fwd.nheads * s.tiles, slices = p.fwd.nheads * s.slices;
  if (memory.segment_starts != nullptr)
    launch_kernel(kOp, selective_scan_general_bwd_starts_kernel<T, kComplex>,
                  {blocks_for(p.fwd.rows * tiles, 1), kThreads, shared}, exec, p, s, memory,
                  faults);
  for (int64_t i = s.segments - 1; i >= 0; --i) {
    const Segment segment{i, i * s.segment_l, std::min((i + 1) * s.segment_l, p.fwd.seqlen)};
    launch_kernel(kOp, selective_scan_general_bwd_kernel<T, kComplex>,
                  {blocks_for(s.row_slices * slices, 1), kThreads, shared}, exec, p, s, memory,
                  segment, faults);
    const auto add_slices = [&](const StridedGradient<4>& gradient, int64_t ngroups,
                                const auto* partial) {
      if (partial == nullptr) return;
      const int64_t count = s.batch * ngroups * (segment.end - segment.begin) * p.fwd.dstate;
      launch_kernel(kOp, selective_scan_general_bwd_steps_kernel<T, kComplex>,
                    {blocks_for(count * (kComplex ? 2 : 1), kThreads), kThreads}, exec, gradient,
                    ngroups, slices / ngroups, p.fwd.dstate, s, segment,
                    reinterpret_cast<const Real*>(partial));
    };
    add_slices(p.dB, p.ngroups_B, memory.dB);
    add_slices(p.dC, p.ngroups_C, memory.dC);
  }
  launch_kernel(kOp, selective_scan_general_bwd_channels_kernel<Real, kComplex>,
                {blocks_for(tiles, 1), kThreads}, exec, p, s, memory);
}

}  // namespace

// Neither the lanes of a channel nor, where it must not, the slices depend on the batch: sums over
// states and over channels do not either.
GeneralBwdShape::GeneralBwdShape(const SelectiveScanBwdParams& p, int num_sms,
                                 bool batch_invariant) {
  constexpr int64_t kMaxRowSlices = 16;
  constexpr int64_t kMostChannels = 32;  // of a slice that has several tiles
  constexpr int64_t kBlocksToFill = 4;   // a multiprocessor
  constexpr int64_t kLeastSegment = 128;
  constexpr int64_t kSegmentBytes = int64_t{128} << 20;  // of memory that grows with segment_l
  const SelectiveScanFwdParams& fwd = p.fwd;
  const int64_t numbers = fwd.dstate * (fwd.complex ? 2 : 1);
  const size_t real = fwd.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  const int gradients = (p.dB ? 1 : 0) + (p.dC ? 1 : 0);  // with sums over channels

  lanes = power_of_two_from(ceil_div(numbers, kQuad));
  tile_d = kThreads / lanes;
  block_l = numbers <= 256 ? 16 : 8;
  quads = static_cast<int>(ceil_div(numbers, kQuad));
  tiles = ceil_div(fwd.headdim, tile_d);
  row_slices = std::min(fwd.rows, kMaxRowSlices);
  batch = fwd.cu_seqlens ? 1 : fwd.rows;

  // Slices of several tiles need less memory for sums, where there are blocks enough.
  const int64_t rows = batch_invariant || fwd.cu_seqlens ? 1 : row_slices;
  const int64_t all = rows * fwd.nheads * tiles;
  slice_tiles = gradients == 0 ? 1
                               : std::clamp<int64_t>(all / (kBlocksToFill * num_sms), 1,
                                                     std::max<int64_t>(1, kMostChannels / tile_d));
  slices = ceil_div(tiles, slice_tiles);

  const int64_t starts_of_step = fwd.nheads * tiles * kThreads * kQuad / block_l;
  const int64_t sums_of_step = fwd.nheads * slices * quads * kQuad * gradients;
  const int64_t bytes_of_step =
      batch * (starts_of_step + sums_of_step) * static_cast<int64_t>(real);
  segment_l = std::max(kSegmentBytes / bytes_of_step, kLeastSegment) / block_l * block_l;
  starts_in_chunk_states = false;
  if (segment_l >= fwd.seqlen) {
    segment_l = fwd.seqlen;
  } else if (fwd.chunk_states && !fwd.cu_seqlens && fwd.chunk_size <= segment_l) {
    segment_l -= segment_l % fwd.chunk_size;
    starts_in_chunk_states = true;
  }
  segments = ceil_div(fwd.seqlen, segment_l);
}

size_t selective_scan_general_bwd_workspace_size(const SelectiveScanBwdParams& p,
                                                 const Context& context) {
  const GeneralBwdShape shape = shape_of(p, context);
  Scratch scratch = Scratch::nowhere();
  if (p.fwd.dtype == DType::float64)
    GeneralBwdMemory<double>(p, shape, scratch);
  else
    GeneralBwdMemory<float>(p, shape, scratch);
  return scratch.used();
}

void selective_scan_general_bwd(const SelectiveScanBwdParams& p, const Exec& exec) {
  const GeneralBwdShape shape = shape_of(p, exec.context);
  with_scan_type(p.fwd, [&](auto* type, auto is_complex) {
    run<std::remove_pointer_t<decltype(type)>, decltype(is_complex)::value>(p, shape, exec);
  });
}

}  // namespace ssmcore::cuda
