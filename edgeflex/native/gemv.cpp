#include "gemv.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#endif

namespace edgeflex {

#if defined(__x86_64__)
namespace {

#define EFX_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

// Measured on Zen 5: 4 to 12 KiB are alike; below 2 KiB and above 16 KiB the rate falls.
constexpr size_t kAhead = 6144;

EFX_VNNI inline void prefetch(const uint8_t* address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

EFX_VNNI inline __mmask16 mask_of(size_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}

template <typename T>
EFX_VNNI inline T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Layout, for each 16 rows: 16 sums of weights (fp32); for each 32 columns 256 bytes of nibbles and 16 bfloat16
// scales; 16 biases. A 128-byte piece holds 16 columns of 16 rows: 8 columns in the low nibbles, 8 in the high ones.
// Nibbles are signed and multiplied by 16, which the packed scales undo.
EFX_VNNI void gemv_int4(const uint8_t* x, QuantisedRow row, const uint8_t* packed, size_t first, size_t last,
                        size_t columns, float* out) {
  const __m512i high = _mm512_set1_epi8(static_cast<char>(0xf0));
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512 zero_point = _mm512_set1_ps(static_cast<float>(row.zero_point));
  const __m512 scale = _mm512_set1_ps(row.scale);
  const uint8_t* w = packed + first / 16 * (128 + columns / 32 * 288);
  for (size_t n = first; n < last; n += 16) {
    __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(w), zero_point);
    w += 64;
    for (size_t k = 0; k < columns; k += 32) {
      __m512i low0 = _mm512_setzero_si512(), high0 = low0, low1 = low0, high1 = low0;
      for (size_t half = 0; half < 32; half += 16) {
        const __m512i x0 = _mm512_set1_epi64(read<int64_t>(x + k + half));
        const __m512i x1 = _mm512_set1_epi64(read<int64_t>(x + k + half + 8));
        const __m512i w0 = _mm512_loadu_si512(w);
        const __m512i w1 = _mm512_loadu_si512(w + 64);
        prefetch(w + kAhead);
        prefetch(w + kAhead + 64);
        low0 = _mm512_dpbusd_epi32(low0, x0, _mm512_and_si512(_mm512_slli_epi32(w0, 4), high));
        low1 = _mm512_dpbusd_epi32(low1, x0, _mm512_and_si512(_mm512_slli_epi32(w1, 4), high));
        high0 = _mm512_dpbusd_epi32(high0, x1, _mm512_and_si512(w0, high));
        high1 = _mm512_dpbusd_epi32(high1, x1, _mm512_and_si512(w1, high));
        w += 128;
      }
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
      const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
      prefetch(w + kAhead);
      w += 32;
      const __m512i all0 = _mm512_add_epi32(low0, high0), all1 = _mm512_add_epi32(low1, high1);
      const __m512i pairs0 = _mm512_add_epi32(all0, _mm512_srli_epi64(all0, 32));
      const __m512i pairs1 = _mm512_add_epi32(all1, _mm512_srli_epi64(all1, 32));
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_permutex2var_epi32(pairs0, even, pairs1)), scales, sum);
    }
    sum = _mm512_add_ps(_mm512_mul_ps(sum, scale), _mm512_loadu_ps(w));
    w += 64;
    _mm512_mask_storeu_ps(out + n, mask_of(last - n), sum);
  }
}

// Layout, for each 64 rows: 64 sums of weights (int32); for each 4 columns 64 times 4 bytes; 64 scales; 64 biases.
EFX_VNNI void gemv_int8(const uint8_t* x, QuantisedRow row, const uint8_t* packed, size_t first, size_t last,
                        size_t columns, float* out) {
  const __m512i zero_point = _mm512_set1_epi32(row.zero_point);
  const __m512 scale = _mm512_set1_ps(row.scale);
  const size_t padded = (columns + 3) / 4 * 4;
  const uint8_t* w = packed + first * (padded + 12);
  for (size_t n = first; n < last; n += 64) {
    __m512i sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = _mm512_mullo_epi32(_mm512_loadu_si512(w + 64 * i), zero_point);
    w += 256;
    for (size_t k = 0; k < padded; k += 4) {
      const __m512i x0 = _mm512_set1_epi32(read<int32_t>(x + k));
      for (int i = 0; i < 4; ++i) {
        prefetch(w + kAhead + 64 * i);
        sums[i] = _mm512_dpbusd_epi32(sums[i], x0, _mm512_loadu_si512(w + 64 * i));
      }
      w += 256;
    }
    for (size_t i = 0; i < 4 && n + 16 * i < last; ++i) {
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), scale);
      const __m512 scales = _mm512_loadu_ps(w + 64 * i), biases = _mm512_loadu_ps(w + 256 + 64 * i);
      _mm512_mask_storeu_ps(out + n + 16 * i, mask_of(last - n - 16 * i), _mm512_fmadd_ps(value, scales, biases));
    }
    w += 512;
  }
}

}  // namespace

Gemv find_gemv(bool four_bits) {
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vnni");
  if (!has) return nullptr;
  return four_bits ? gemv_int4 : gemv_int8;
}

#else

Gemv find_gemv(bool) { return nullptr; }

#endif

}  // namespace edgeflex
