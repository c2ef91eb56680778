// Vec: as many floats as one register of the instruction set at hand holds, and how activations of
// any dtype become one. Kernels include this and are compiled once per instruction set, each time
// in a namespace of its own (SSMCORE_CPU_NAMESPACE), so that no two of them share a symbol.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "ssmcore/tensor.h"

#define SSMCORE_INLINE inline __attribute__((always_inline))

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

// GCC's and Clang's vector types: arithmetic and comparisons work lane by lane.
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Bits16Vec __attribute__((vector_size(kLanes * 2)));

// 16-bit activations, as stored.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Not std's: a function shared between translation units of different instruction sets could be
// linked from the wrong one.
SSMCORE_INLINE int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
SSMCORE_INLINE int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

SSMCORE_INLINE Vec broadcast(float value) {
  return value - Vec{};
}

// Lane by lane: condition ? a : b, where `condition` is a comparison's result.
SSMCORE_INLINE Vec select(IntVec condition, Vec a, Vec b) {
  return condition ? a : b;
}

template <typename To, typename From>
SSMCORE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

SSMCORE_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

SSMCORE_INLINE void store(float* to, Vec v) {
  std::memcpy(to, &v, sizeof(v));
}

SSMCORE_INLINE Vec load(const bfloat16* from) {
#if defined(__AVX512F__)
  // What GCC 12 makes of the conversion below takes four instructions.
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#endif
  Bits16Vec bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<Vec>(__builtin_convertvector(bits, UintVec) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
SSMCORE_INLINE void store(bfloat16* to, Vec v) {
  const UintVec bits = bit_cast<UintVec>(v);
  const UintVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const UintVec nan = bits | 0x400000;
  const Bits16Vec out = __builtin_convertvector((v == v ? rounded : nan) >> 16, Bits16Vec);
  std::memcpy(to, &out, sizeof(out));
}

#if !defined(__F16C__)
SSMCORE_INLINE float half_to_float(uint16_t half) {
  // The exponent is rebiased by multiplying with 2^112, which also makes subnormals right.
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value = bit_cast<float>(magnitude) * 0x1p112f;
  if ((half & 0x7c00) == 0x7c00) value = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(value) | static_cast<uint32_t>(half & 0x8000) << 16);
}

SSMCORE_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds beyond 65504
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}
#endif

SSMCORE_INLINE Vec load(const float16* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(from[i].bits);
  return v;
#endif
}

SSMCORE_INLINE void store(float16* to, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) to[i].bits = float_to_half(v[i]);
#endif
}

// Fills `to` with the first n elements of `from` and zeros: a register's worth or half of one.
template <typename T, int kCount>
SSMCORE_INLINE void read_partial(const T* from, int64_t n, T (&to)[kCount]) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = ~(~uint64_t{0} << n);
  if constexpr (sizeof(T) == 4)
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from));
  else if constexpr (kCount == 2 * kLanes)
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, from));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
#else
  for (int64_t i = 0; i < kCount; ++i) to[i] = i < n ? from[i] : T{};
#endif
}

// The first n < kLanes elements, the rest 0.
template <typename T>
SSMCORE_INLINE Vec load_partial(const T* from, int64_t n) {
  T lanes[kLanes];
  read_partial(from, n, lanes);
  return load(lanes);
}

template <typename T>
SSMCORE_INLINE void store_partial(T* to, Vec v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) to[i] = lanes[i];
}

// One element as float, and back.
SSMCORE_INLINE float to_float(float value) {
  return value;
}
SSMCORE_INLINE float to_float(bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
SSMCORE_INLINE float to_float(float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  return half_to_float(value.bits);
#endif
}

SSMCORE_INLINE void from_float(float value, float* to) {
  *to = value;
}
SSMCORE_INLINE void from_float(float value, bfloat16* to) {
  store_partial(to, broadcast(value), 1);
}
SSMCORE_INLINE void from_float(float value, float16* to) {
  store_partial(to, broadcast(value), 1);
}

// Keeps the compiler from loading v again at each of its uses.
SSMCORE_INLINE Vec in_register(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Within every quad of lanes: elements p of a (0 to 3) and of b (4 to 7).
#define SSMCORE_AT(p, base) ((p) < 4 ? (p) + (base) : (p) - 4 + kLanes + (base))
#define SSMCORE_QUAD(p0, p1, p2, p3, base) \
  SSMCORE_AT(p0, base), SSMCORE_AT(p1, base), SSMCORE_AT(p2, base), SSMCORE_AT(p3, base)
#if defined(__AVX512F__)
#define SSMCORE_SHUFFLE(a, b, p0, p1, p2, p3)                                                     \
  __builtin_shufflevector(a, b, SSMCORE_QUAD(p0, p1, p2, p3, 0), SSMCORE_QUAD(p0, p1, p2, p3, 4), \
                          SSMCORE_QUAD(p0, p1, p2, p3, 8), SSMCORE_QUAD(p0, p1, p2, p3, 12))
#elif defined(__AVX__)
#define SSMCORE_SHUFFLE(a, b, p0, p1, p2, p3) \
  __builtin_shufflevector(a, b, SSMCORE_QUAD(p0, p1, p2, p3, 0), SSMCORE_QUAD(p0, p1, p2, p3, 4))
#else
#define SSMCORE_SHUFFLE(a, b, p0, p1, p2, p3) \
  __builtin_shufflevector(a, b, SSMCORE_QUAD(p0, p1, p2, p3, 0))
#endif

typedef float Quad __attribute__((vector_size(16)));

// The sums of the lanes of four vectors, each in the same fixed order.
SSMCORE_INLINE Quad horizontal_sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = SSMCORE_SHUFFLE(a, b, 0, 4, 1, 5) + SSMCORE_SHUFFLE(a, b, 2, 6, 3, 7);
  const Vec cd = SSMCORE_SHUFFLE(c, d, 0, 4, 1, 5) + SSMCORE_SHUFFLE(c, d, 2, 6, 3, 7);
  // Every quad now holds a share of a, b, c and d.
  const Vec abcd = SSMCORE_SHUFFLE(ab, cd, 0, 1, 4, 5) + SSMCORE_SHUFFLE(ab, cd, 2, 3, 6, 7);
  Quad quads[kLanes / 4];
  std::memcpy(quads, &abcd, sizeof(abcd));
  for (int half = kLanes / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) quads[i] += quads[i + half];
  return quads[0];
}

SSMCORE_INLINE float horizontal_sum(Vec v) {
  return horizontal_sums(v, v, v, v)[0];
}

// Calls body with a null pointer of the activation type that `dtype` names.
template <typename Body>
SSMCORE_INLINE void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bfloat16:
      return body(static_cast<bfloat16*>(nullptr));
    case DType::float16:
      return body(static_cast<float16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
