// Which instruction sets there are, and the kernels of each.
#include "../kernels.h"

namespace ssmcore {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    default:
      return "baseline";
  }
}

Isa detect_isa() {
#if defined(SSMCORE_X86_KERNELS)
  __builtin_cpu_init();
  // Every CPU with both has F16C too, for which Clang 14 has no name here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = __builtin_cpu_supports("avx512bf16");
  if (avx2 && avx512) return bf16 ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

namespace cpu {

namespace baseline {
extern const KernelTable table;
}
#if defined(SSMCORE_X86_KERNELS)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
#endif

const KernelTable& kernel_table([[maybe_unused]] Isa isa) {
#if defined(SSMCORE_X86_KERNELS)
  if (isa == Isa::avx512_bf16) return avx512_bf16::table;
  if (isa == Isa::avx512) return avx512::table;
  if (isa == Isa::avx2) return avx2::table;
#endif
  return baseline::table;
}

}  // namespace cpu
}  // namespace ssmcore
