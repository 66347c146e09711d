// Small fp32 kernels of a decoder: norms, rotary positions, SiLU, softmax attention, routing scores.
//
// Everything is written with the compilers' vector extension, so that one source serves AVX-512, AVX2 and NEON.
// Every result depends only on its own row: the order of additions never depends on how rows are grouped or on
// threads, so that a token's numbers do not change with either.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace edgeflex {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
#else
#error "compile for AArch64, or for x86-64 with AVX2, FMA and F16C (CXXFLAGS=-march=haswell or later)"
#endif
#if defined(__x86_64__) && !defined(__F16C__)
#error "compile with F16C (CXXFLAGS=-march=haswell or later)"
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
// The same vector at any address of a float.
typedef float LooseVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }
inline Vec splat(float value) { return Vec{} + value; }

// Half-precision numbers, as the key/value cache may keep them.
struct Half {
  uint16_t bits;
};

inline Half to_half(float value) {
  value = value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const __fp16 half = static_cast<__fp16>(value);
  Half result;
  std::memcpy(&result, &half, sizeof result);
  return result;
#endif
}

inline void keep(float value, float* to) { *to = value; }
inline void keep(float value, Half* to) { *to = to_half(value); }

inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return (Vec)vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(from)));
#endif
}

inline float sum_of(Vec value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// e^x, error below 2 ulp; x is clamped to the range in which e^x is a normal number (S. Moshier, Cephes, expf).
inline Vec exp_of(Vec x) {
  x = x < -87.33f ? splat(-87.33f) : x;
  x = x > 88.37f ? splat(88.37f) : x;
  const Vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  Vec r = x - n * 0.693145751953125f;
  r = r - n * 1.428606765330187e-06f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * (Vec)exponent;
}

inline float exp_of(float x) {
  return exp_of(splat(x))[0];
}

inline float dot(const float* a, const float* b, size_t count) {
  Vec sums[4] = {};
  size_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(a + i + j * kLanes + 1024);  // rows of a router come from memory, one after the other
      sums[j] += load(a + i + j * kLanes) * load(b + i + j * kLanes);
    }
  }
  float tail = 0.0f;
  for (; i < count; ++i) tail += a[i] * b[i];
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail;
}

// Root-mean-square norm (Zhang and Sennrich 2019, eq. 4). `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, size_t count, float epsilon, float* out) {
  const float scale = 1.0f / std::sqrt(dot(x, x, count) / static_cast<float>(count) + epsilon);
  for (size_t i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

// Rotary positions in half-split order (Su et al. 2021, §3.4.2), in place.
inline void rotate(float* x, const float* cosine, const float* sine, size_t half) {
  for (size_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosine[i] - second * sine[i];
    x[i + half] = second * cosine[i] + first * sine[i];
  }
}

// out = silu(gate) * up, where silu(x) = x / (1 + e^-x).
inline void silu_multiply(const float* gate, const float* up, size_t count, float* out) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec g = load(gate + i);
    store(out + i, g / (1.0f + exp_of(-g)) * load(up + i));
  }
  for (; i < count; ++i) out[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

// --- attention ----------------------------------------------------------------------------------------------
//
// The cache lies in blocks of 16 positions, with all heads in each, so that what is used lies together. A head's keys
// in a block lie [dimension][16], so that scores of 16 positions come from one stream and need no sums across lanes;
// its values lie [16][padded dimension]. Strides are from block to block.

constexpr size_t kKeyBlock = 16;
constexpr int kParts = kKeyBlock / kLanes;
// How many key blocks are held in registers at once, for four query rows and for one.
constexpr int kBlocksOfFour = kLanes == 16 ? 4 : 1;
constexpr int kBlocksOfOne = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;

template <int R, int B, typename T>
inline void score_tile(const float* const* queries, const T* keys, size_t key_stride, size_t dims, float* scores,
                       size_t stride) {
  Vec sums[R][B * kParts] = {};
  for (size_t d = 0; d < dims; ++d) {
    Vec key[B * kParts];
    for (int b = 0; b < B; ++b) {
      for (int p = 0; p < kParts; ++p) key[b * kParts + p] = load(keys + b * key_stride + d * kKeyBlock + p * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < B * kParts; ++c) sums[r][c] += queries[r][d] * key[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < B * kParts; ++c) store(scores + r * stride + c * kLanes, sums[r][c]);
  }
}

template <int R, int B, typename T>
inline void score_rows(const float* const* queries, const T* keys, size_t key_stride, size_t dims, size_t blocks,
                       float* scores, size_t stride) {
  size_t block = 0;
  for (; block + B <= blocks; block += B) {
    score_tile<R, B>(queries, keys + block * key_stride, key_stride, dims, scores + block * kKeyBlock, stride);
  }
  for (; block < blocks; ++block) {
    score_tile<R, 1>(queries, keys + block * key_stride, key_stride, dims, scores + block * kKeyBlock, stride);
  }
}

template <int R, int W, typename T>
inline void value_tile(const float* weights, size_t stride, const T* values, size_t value_stride, size_t padded,
                       size_t positions, float* out, size_t out_stride) {
  Vec sums[R][W] = {};
  for (size_t first = 0; first < positions; first += kKeyBlock, values += value_stride) {
    const size_t count = positions - first < kKeyBlock ? positions - first : kKeyBlock;
    for (size_t j = 0; j < count; ++j) {
      Vec value[W];
      for (int w = 0; w < W; ++w) value[w] = load(values + j * padded + w * kLanes);
      for (int r = 0; r < R; ++r) {
        for (int w = 0; w < W; ++w) sums[r][w] += weights[r * stride + first + j] * value[w];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) store(out + r * out_stride + w * kLanes, sums[r][w]);
  }
}

template <int R, int W, typename T>
inline void value_rows(const float* weights, size_t stride, const T* values, size_t value_stride, size_t padded,
                       size_t positions, float* out, size_t out_stride) {
  size_t d = 0;
  for (; d + W * kLanes <= padded; d += W * kLanes) {
    value_tile<R, W>(weights, stride, values + d, value_stride, padded, positions, out + d, out_stride);
  }
  for (; d < padded; d += kLanes) {
    value_tile<R, 1>(weights, stride, values + d, value_stride, padded, positions, out + d, out_stride);
  }
}

// Softmax of `scale * scores` over the first `valid` of `count` positions, in place and not yet divided by its
// sum, which is returned; the positions after `valid` become 0. `count` is a multiple of 16.
inline float softmax_row(float* scores, size_t valid, size_t count, float scale) {
  for (size_t j = valid; j < count; ++j) scores[j] = -INFINITY;
  Vec best = splat(-INFINITY);
  for (size_t j = 0; j < count; j += kLanes) {
    const Vec value = load(scores + j);
    best = value > best ? value : best;
  }
  float highest = best[0];
  for (int i = 1; i < kLanes; ++i) highest = best[i] > highest ? best[i] : highest;
  Vec total = {};
  for (size_t j = 0; j < count; j += kLanes) {
    const Vec value = load(scores + j);
    const Vec power = exp_of((value - highest) * scale);
    const Vec kept = value == -INFINITY ? Vec{} : power;
    store(scores + j, kept);
    total += kept;
  }
  return sum_of(total);
}

template <typename T>
struct AttentionRows {
  const float* const* queries;  // [rows] pointers
  float* const* outputs;        // [rows] pointers
  const size_t* valid;          // [rows] positions that each row sees
  size_t rows;
  const T* keys;
  const T* values;
  size_t key_stride;
  size_t value_stride;
  size_t head_dim;
  size_t value_dim;
  size_t padded;  // of values
  float scale;
};

// Attends for rows that share one key/value head. `scores` has rows * stride floats, `sums` 4 * padded.
template <typename T>
inline void attend(const AttentionRows<T>& work, float* scores, size_t stride, float* sums) {
  size_t longest = 0;
  for (size_t r = 0; r < work.rows; ++r) longest = work.valid[r] > longest ? work.valid[r] : longest;
  const size_t blocks = (longest + kKeyBlock - 1) / kKeyBlock;
  size_t row = 0;
  for (; row + 4 <= work.rows; row += 4) {
    score_rows<4, kBlocksOfFour>(work.queries + row, work.keys, work.key_stride, work.head_dim, blocks,
                                 scores + row * stride, stride);
  }
  for (; row < work.rows; ++row) {
    score_rows<1, kBlocksOfOne>(work.queries + row, work.keys, work.key_stride, work.head_dim, blocks,
                                scores + row * stride, stride);
  }
  const auto finish = [&](size_t r, float total, const float* summed) {
    for (size_t d = 0; d < work.value_dim; ++d) work.outputs[r][d] = summed[d] / total;
  };
  for (row = 0; row < work.rows;) {
    const size_t group = row + 4 <= work.rows ? 4 : 1;
    float totals[4];
    for (size_t i = 0; i < group; ++i) {
      totals[i] = softmax_row(scores + (row + i) * stride, work.valid[row + i], blocks * kKeyBlock, work.scale);
    }
    const float* weights = scores + row * stride;
    if (group == 4) {
      value_rows<4, 4>(weights, stride, work.values, work.value_stride, work.padded, longest, sums, work.padded);
    } else {
      value_rows<1, 8>(weights, stride, work.values, work.value_stride, work.padded, longest, sums, work.padded);
    }
    for (size_t i = 0; i < group; ++i) finish(row + i, totals[i], sums + i * work.padded);
    row += group;
  }
}

}  // namespace edgeflex
