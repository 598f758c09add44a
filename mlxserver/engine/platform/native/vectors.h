// Vectors of LANES floats, as the kernels use them. They are those of GCC and Clang, so one text has NEON, SSE2, AVX2 and
// AVX-512.
//
// Rule: everything here is in an unnamed namespace. Of an inline function with a linker's name one copy would be kept,
//       which may be the one for another instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

// Name of a kernel of the instruction set LEVEL.
#define JOINED(kernel, level) kernel##_##level
#define LEVEL_NAME(kernel, level) JOINED(kernel, level)
#define NAME(kernel) LEVEL_NAME(kernel, LEVEL)

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr float POWER = 5192296858534827628530496329220096.0f;  // 2^112: the exponents' difference of both floats

template <typename V>
inline V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// `Floats{} + value` would be an addition, because it makes 0 of -0.
inline Floats splat(float value) { return value - Floats{}; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float total(Floats v) {
  float sum[LANES];
  __builtin_memcpy(sum, &v, sizeof v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  return sum[0];
}

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// One value as float32. A float16's exponent is moved by a product, which is exact for subnormal ones, too.
inline float widened(float value) { return value; }
inline float widened(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float widened(Float16 value) {
  const uint32_t bits = value.bits;
  return as_float((bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13) * POWER;
}

inline Words load_halves(const void* from) {
#if LANES == 16
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(load<__m256i>(from)));
#elif LANES == 8
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(load<__m128i>(from)));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  return __builtin_convertvector(load<Halves>(from), Words);
#endif
}

// LANES values as float32.
inline Floats load_widened(const float* from) { return load<Floats>(from); }
inline Floats load_widened(const BFloat16* from) { return reinterpret_cast<Floats>(load_halves(from) << 16); }
inline Floats load_widened(const Float16* from) {
#if LANES == 16
  return _mm512_cvtph_ps(load<__m256i>(from));
#elif LANES == 8
  return _mm256_cvtph_ps(load<__m128i>(from));
#else
  const Words bits = load_halves(from);
  return reinterpret_cast<Floats>((bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13) * POWER;
#endif
}

constexpr float LOWEST = -1e30f;

// exp(x) to 1e-7: the method of the Cephes library (Moshier 1984-1992).
inline Floats exponential(Floats x) {
  x = x > splat(-87.0f) ? x : splat(-87.0f);
  x = x < splat(88.0f) ? x : splat(88.0f);
  const Floats power = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // rounds: such floats are integers
  const Floats rest = x - power * 0.693359375f + power * 2.12194440e-4f;
  Floats sum = splat(1.9875691500e-4f);
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  const Floats mantissa = sum * (rest * rest) + rest + 1.0f;
  const Ints exponent = (__builtin_convertvector(power, Ints) + 127) << 23;
  return mantissa * reinterpret_cast<Floats>(exponent);
}

// LANES values, or fewer and `other` for the rest.
inline Floats load_some(const float* from, int64_t count, float other) {
  if (count >= LANES) return load<Floats>(from);
  float values[LANES];
  for (int i = 0; i < LANES; i++) values[i] = i < count ? from[i] : other;
  return load<Floats>(values);
}

inline void store_some(Floats values, int64_t count, float* to) {
  if (count >= LANES)
    __builtin_memcpy(to, &values, sizeof values);
  else
    __builtin_memcpy(to, &values, 4 * count);
}

template <int STEP, size_t... LANE>
inline void exchange(Floats& a, Floats& b, std::index_sequence<LANE...>) {
  const Floats low = __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE - STEP : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE : LANE + STEP)...);
  a = low;
}

// Lane l of vector v becomes lane v of vector l: of squares, from the largest to the smallest, the corners are exchanged.
template <int STEP = LANES / 2>
inline void transpose(Floats (&vectors)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & STEP)) exchange<STEP>(vectors[i], vectors[i + STEP], std::make_index_sequence<LANES>());
  if constexpr (STEP > 1) transpose<STEP / 2>(vectors);
}

inline float most(Floats v) {
  float values[LANES];
  __builtin_memcpy(values, &v, sizeof v);
  for (int i = 1; i < LANES; i++) values[0] = values[i] > values[0] ? values[i] : values[0];
  return values[0];
}

}  // namespace
