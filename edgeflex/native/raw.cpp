#include "raw.h"

#include <algorithm>

#include "kernels.h"

namespace edgeflex {
namespace {

constexpr size_t kTask = 64;  // matrix rows that a thread takes at a time
constexpr int kLane = 16;

typedef float Wide __attribute__((vector_size(kLane * sizeof(float))));
typedef int32_t WideInt __attribute__((vector_size(kLane * sizeof(int32_t))));
typedef int8_t Bytes __attribute__((vector_size(kLane)));
typedef uint8_t Unsigned __attribute__((vector_size(kLane)));

template <typename T>
inline T read(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Compilers make sixteen single steps of the general form.
inline Wide widen(Bytes codes) {
#if defined(__AVX512F__)
  return (Wide)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
#elif defined(__AVX2__)
  const __m128i whole = (__m128i)codes;
  const __m256 halves[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(whole)),
                            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(whole, 8)))};
  return read<Wide>(halves);
#else
  return __builtin_convertvector(__builtin_convertvector(codes, WideInt), Wide);
#endif
}

// The order of additions is that of the columns: it depends on nothing else.
inline float total(const Wide& value) {
  float lanes[kLane];
  std::memcpy(lanes, &value, sizeof lanes);
  for (int width = kLane / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// `x` holds, for each 32 columns, the 16 even ones and then the 16 odd ones.
template <int R>
inline void dot_int4(const uint8_t* codes, const uint8_t* scales, const float* const* x, size_t columns, float* out) {
  Wide sums[R] = {};
  for (size_t k = 0; k < columns; k += kGroup, codes += kGroup / 2, scales += 2) {
    const Unsigned pair = read<Unsigned>(codes);
    const Wide even = widen((Bytes)((pair & 15) - 8)), odd = widen((Bytes)((pair >> 4) - 8));
    const float scale = from_bfloat16(read<uint16_t>(scales));
    for (int r = 0; r < R; ++r) {
      sums[r] += scale * (even * read<Wide>(x[r] + k) + odd * read<Wide>(x[r] + k + kLane));
    }
  }
  for (int r = 0; r < R; ++r) out[r] = total(sums[r]);
}

template <int R>
inline void dot_int8(const uint8_t* codes, const uint8_t* scale, const float* const* x, size_t columns, float* out) {
  Wide sums[R] = {};
  size_t k = 0;
  for (; k + kLane <= columns; k += kLane) {
    const Wide weights = widen(read<Bytes>(codes + k));
    for (int r = 0; r < R; ++r) sums[r] += weights * read<Wide>(x[r] + k);
  }
  for (int r = 0; r < R; ++r) {
    float tail = 0.0f;
    for (size_t i = k; i < columns; ++i) tail += static_cast<float>(static_cast<int8_t>(codes[i])) * x[r][i];
    out[r] = (total(sums[r]) + tail) * read<float>(scale);
  }
}

template <int R>
inline void dot_float(const uint8_t* values, const float* const* x, size_t columns, float* out) {
  Wide sums[R] = {};
  size_t k = 0;
  for (; k + kLane <= columns; k += kLane) {
    const Wide weights = read<Wide>(values + k * sizeof(float));
    for (int r = 0; r < R; ++r) sums[r] += weights * read<Wide>(x[r] + k);
  }
  for (int r = 0; r < R; ++r) {
    float tail = 0.0f;
    for (size_t i = k; i < columns; ++i) tail += read<float>(values + i * sizeof(float)) * x[r][i];
    out[r] = total(sums[r]) + tail;
  }
}

template <int R>
inline void dot_rows(const RawMatrix& m, size_t row, const float* const* x, float* out) {
  if (m.precision == kInt4) {
    const size_t groups = m.columns / kGroup;
    dot_int4<R>(m.codes + row * m.columns / 2, m.scales + row * groups * 2, x, m.columns, out);
  } else if (m.precision == kInt8) {
    dot_int8<R>(m.codes + row * m.columns, m.scales + row * sizeof(float), x, m.columns, out);
  } else {
    dot_float<R>(m.codes + row * m.columns * sizeof(float), x, m.columns, out);
  }
}

}  // namespace

RawExperts::RawExperts(size_t threads) : lib_(library()) {
  if (threads < 2) return;
  pool_ = lib_.create_pool(threads);
  if (pool_ == nullptr) fail("no pool of " + std::to_string(threads) + " threads could be made");
}

RawExperts::~RawExperts() {
  if (pool_ != nullptr) lib_.destroy_pool(pool_);
}

template <typename Task>
void RawExperts::parallel(size_t count, const Task& task) {
  if (pool_ == nullptr || count < 2) {
    for (size_t i = 0; i < count; ++i) task(i);
    return;
  }
  lib_.parallel(
      pool_, [](void* context, size_t, size_t i) { (*static_cast<const Task*>(context))(i); }, const_cast<Task*>(&task),
      count, 0);
}

void RawExperts::multiply(const RawMatrix& matrix, const float* rows, size_t count, float* out) {
  const float* x = rows;
  if (matrix.precision == kInt4) {
    split_.resize(count * matrix.columns);
    for (size_t i = 0; i < count * matrix.columns; ++i) {
      split_[i / kGroup * kGroup + i % 2 * kLane + i % kGroup / 2] = rows[i];
    }
    x = split_.data();
  }
  parallel((matrix.rows + kTask - 1) / kTask, [&](size_t task) {
    const size_t first = task * kTask, last = std::min(first + kTask, matrix.rows);
    for (size_t token = 0; token < count;) {
      const size_t step = token + 4 <= count ? 4 : 1;
      const float* inputs[4] = {};
      for (size_t i = 0; i < step; ++i) inputs[i] = x + (token + i) * matrix.columns;
      for (size_t row = first; row < last; ++row) {
        float found[4];
        step == 4 ? dot_rows<4>(matrix, row, inputs, found) : dot_rows<1>(matrix, row, inputs, found);
        for (size_t i = 0; i < step; ++i) out[(token + i) * matrix.rows + row] = found[i];
      }
      token += step;
    }
  });
}

void RawExperts::run(const RawMatrix& gate_up, const RawMatrix& down, const float* rows, size_t count, float* out) {
  for (const RawMatrix* one : {&gate_up, &down}) {
    if (one->precision < 0 || one->precision >= kPrecisions || one->rows == 0 || one->columns == 0 ||
        one->codes == nullptr || (one->precision != kFloat && one->scales == nullptr)) {
      refuse("an expert needs matrices with a known precision, rows, columns, codes, and scales unless they are fp32");
    }
    if (one->precision == kInt4 && one->columns % kGroup != 0) refuse("an int4 matrix has columns in groups of 32");
  }
  if (gate_up.columns != down.rows || gate_up.rows != 2 * down.columns) refuse("gate_up and down are no pair");
  const size_t inner = down.columns;
  wide_.resize(count * 2 * inner);
  narrow_.resize(count * inner);
  multiply(gate_up, rows, count, wide_.data());
  for (size_t i = 0; i < count; ++i) {
    silu_multiply(wide_.data() + i * 2 * inner, wide_.data() + i * 2 * inner + inner, inner, narrow_.data() + i * inner);
  }
  multiply(down, narrow_.data(), count, out);
}

}  // namespace edgeflex
