#include "raw.h"

#include <algorithm>

#include "kernels.h"

namespace edgeflex {
namespace {

constexpr size_t kTask = 64;  // matrix rows that a thread takes at a time
constexpr int kLane = 16;
constexpr size_t kLine = 64;  // bytes of a cache line
constexpr size_t kAhead = 3;  // slices whose bytes are asked for meanwhile; one takes less time than memory to answer

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
inline void add_int4(const uint8_t* codes, const uint8_t* scales, const float* const* x, size_t columns, Wide* lanes) {
  Wide sums[R];
  std::memcpy(sums, lanes, sizeof sums);
  for (size_t k = 0; k < columns; k += kGroup, codes += kGroup / 2, scales += 2) {
    const Unsigned pair = read<Unsigned>(codes);
    const Wide even = widen((Bytes)((pair & 15) - 8)), odd = widen((Bytes)((pair >> 4) - 8));
    const float scale = from_bfloat16(read<uint16_t>(scales));
    for (int r = 0; r < R; ++r) {
      sums[r] += scale * (even * read<Wide>(x[r] + k) + odd * read<Wide>(x[r] + k + kLane));
    }
  }
  std::memcpy(lanes, sums, sizeof sums);
}

// The same of two rows that follow each other: inputs are read once, and one row's sums do not wait for the other's.
template <int R>
inline void add_int4_pair(const uint8_t* codes, const uint8_t* scales, const float* const* x, size_t columns,
                          Wide (*lanes)[R]) {
  const uint8_t *below = codes + columns / 2, *scales_below = scales + columns / kGroup * 2;
  Wide sums[2][R];
  std::memcpy(sums, lanes, sizeof sums);
  for (size_t k = 0; k < columns; k += kGroup) {
    const Unsigned one = read<Unsigned>(codes + k / 2), two = read<Unsigned>(below + k / 2);
    const Wide even[2] = {widen((Bytes)((one & 15) - 8)), widen((Bytes)((two & 15) - 8))};
    const Wide odd[2] = {widen((Bytes)((one >> 4) - 8)), widen((Bytes)((two >> 4) - 8))};
    const float scale[2] = {from_bfloat16(read<uint16_t>(scales + k / kGroup * 2)),
                            from_bfloat16(read<uint16_t>(scales_below + k / kGroup * 2))};
    for (int r = 0; r < R; ++r) {
      const Wide first = read<Wide>(x[r] + k), second = read<Wide>(x[r] + k + kLane);
      for (int i = 0; i < 2; ++i) sums[i][r] += scale[i] * (even[i] * first + odd[i] * second);
    }
  }
  std::memcpy(lanes, sums, sizeof sums);
}

template <int R>
inline void add_int8(const uint8_t* codes, const float* const* x, size_t columns, Wide* lanes, float* tails) {
  Wide sums[R];
  std::memcpy(sums, lanes, sizeof sums);
  size_t k = 0;
  for (; k + kLane <= columns; k += kLane) {
    const Wide weights = widen(read<Bytes>(codes + k));
    for (int r = 0; r < R; ++r) sums[r] += weights * read<Wide>(x[r] + k);
  }
  for (int r = 0; r < R; ++r) {
    for (size_t i = k; i < columns; ++i) tails[r] += static_cast<float>(static_cast<int8_t>(codes[i])) * x[r][i];
  }
  std::memcpy(lanes, sums, sizeof sums);
}

template <int R>
inline void add_float(const uint8_t* values, const float* const* x, size_t columns, Wide* lanes, float* tails) {
  Wide sums[R];
  std::memcpy(sums, lanes, sizeof sums);
  size_t k = 0;
  for (; k + kLane <= columns; k += kLane) {
    const Wide weights = read<Wide>(values + k * sizeof(float));
    for (int r = 0; r < R; ++r) sums[r] += weights * read<Wide>(x[r] + k);
  }
  for (int r = 0; r < R; ++r) {
    for (size_t i = k; i < columns; ++i) tails[r] += read<float>(values + i * sizeof(float)) * x[r][i];
  }
  std::memcpy(lanes, sums, sizeof sums);
}

// Adds the products of one row of slice `slice`.
template <int R>
inline void add_row(const RawMatrix& m, size_t slice, size_t row, const float* const* x, Wide* lanes, float* tails) {
  const uint8_t* codes = m.codes + slice * m.pitch;
  if (m.precision == kInt4) {
    const uint8_t* scales = m.scales + slice * m.scales_pitch + row * (m.columns / kGroup) * 2;
    add_int4<R>(codes + row * m.columns / 2, scales, x, m.columns, lanes);
  } else if (m.precision == kInt8) {
    add_int8<R>(codes + row * m.columns, x, m.columns, lanes, tails);
  } else {
    add_float<R>(codes + row * m.columns * sizeof(float), x, m.columns, lanes, tails);
  }
}

template <int R>
inline void finish_row(const RawMatrix& m, size_t slice, size_t row, const Wide* lanes, const float* tails, float* out,
                       size_t outputs) {
  float scale = 1.0f;
  if (m.precision == kInt8) scale = read<float>(m.scales + slice * m.scales_pitch + row * sizeof(float));
  for (int r = 0; r < R; ++r) out[r * outputs + row] = (total(lanes[r]) + tails[r]) * scale;
}

// Rows of one slice, whose outputs are its own.
template <int R>
void multiply_rows(const RawMatrix& m, size_t slice, size_t first, size_t last, const float* const* x, float* out,
                   size_t outputs) {
  for (size_t row = first; row < last; ++row) {
    Wide lanes[R] = {};
    float tails[R] = {};
    add_row<R>(m, slice, row, x, lanes, tails);
    finish_row<R>(m, slice, row, lanes, tails, out, outputs);
  }
}

// What a thread holds of some rows while it goes from slice to slice.
template <int R>
struct Block {
  Wide lanes[kTask][R];
  float tails[kTask][R];
};

// Adds one slice's products of `count` rows. Its bytes of these rows are too few for the processor to see what comes:
// those at `next`, of a later slice, are asked for meanwhile.
template <int R, int P>
void add_slice(const uint8_t* codes, const uint8_t* scales, const uint8_t* next, const uint8_t* next_scales,
               size_t columns, size_t count, const float* const* x, Block<R>& block) {
  const size_t row_bytes = P == kInt4 ? columns / 2 : P == kInt8 ? columns : columns * sizeof(float);
  const size_t scale_bytes = P == kInt4 ? columns / kGroup * 2 : 0;
  const size_t step = P == kInt4 ? 2 : 1;
  for (size_t row = 0; row < count; row += step) {
    for (size_t at = 0; at < step * row_bytes; at += kLine) __builtin_prefetch(next + at);
    if (P == kInt4) {
      __builtin_prefetch(next_scales);
      if (row + 1 < count) {
        add_int4_pair<R>(codes, scales, x, columns, block.lanes + row);
      } else {
        add_int4<R>(codes, scales, x, columns, block.lanes[row]);
      }
    } else if (P == kInt8) {
      add_int8<R>(codes, x, columns, block.lanes[row], block.tails[row]);
    } else {
      add_float<R>(codes, x, columns, block.lanes[row], block.tails[row]);
    }
    codes += step * row_bytes;
    next += step * row_bytes;
    scales += step * scale_bytes;
    next_scales += step * scale_bytes;
  }
}

// Rows of all slices together, which are columns, one slice after the other as they lie in memory. A sum's lanes go on
// from slice to slice, so that it is the undivided matrix's.
template <int R, int P>
void multiply_across(const RawMatrix& m, size_t first, size_t last, const float* const* x, float* out, size_t outputs) {
  const size_t row_bytes = P == kInt4 ? m.columns / 2 : P == kInt8 ? m.columns : m.columns * sizeof(float);
  const size_t scale_bytes = P == kInt4 ? m.columns / kGroup * 2 : 0;
  const uint8_t *codes = m.codes + first * row_bytes, *scales = m.scales + first * scale_bytes;
  Block<R> block = {};
  for (size_t slice = 0; slice < m.slices; ++slice) {
    const float* inputs[R];
    for (int r = 0; r < R; ++r) inputs[r] = x[r] + slice * m.columns;
    const size_t then = (slice + kAhead) % m.slices, below = slice + kAhead < m.slices ? 0 : kTask;
    const uint8_t* next = codes + then * m.pitch + below * row_bytes;
    const uint8_t* next_scales = scales + then * m.scales_pitch + below * scale_bytes;
    add_slice<R, P>(codes + slice * m.pitch, scales + slice * m.scales_pitch, next, next_scales, m.columns,
                    last - first, inputs, block);
  }
  for (size_t row = first; row < last; ++row) {
    finish_row<R>(m, 0, row, block.lanes[row - first], block.tails[row - first], out, outputs);
  }
}

template <int R>
void multiply_block(const RawMatrix& m, size_t slice, size_t first, size_t last, const float* const* x, float* out,
                    size_t outputs) {
  if (!m.across || m.slices == 1) {
    multiply_rows<R>(m, slice, first, last, x, out, outputs);
  } else if (m.precision == kInt4) {
    multiply_across<R, kInt4>(m, first, last, x, out, outputs);
  } else if (m.precision == kInt8) {
    multiply_across<R, kInt8>(m, first, last, x, out, outputs);
  } else {
    multiply_across<R, kFloat>(m, first, last, x, out, outputs);
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
  const size_t inputs = matrix.columns * (matrix.across ? matrix.slices : 1);
  const size_t apart = matrix.across ? 1 : matrix.slices, outputs = apart * matrix.rows;
  const float* x = rows;
  if (matrix.precision == kInt4) {
    split_.resize(count * inputs);
    for (size_t i = 0; i < count * inputs; ++i) {
      split_[i / kGroup * kGroup + i % 2 * kLane + i % kGroup / 2] = rows[i];
    }
    x = split_.data();
  }
  const size_t blocks = (matrix.rows + kTask - 1) / kTask;
  parallel(apart * blocks, [&](size_t task) {
    const size_t slice = task / blocks, first = task % blocks * kTask, last = std::min(first + kTask, matrix.rows);
    for (size_t token = 0; token < count;) {
      const size_t step = token + 4 <= count ? 4 : 1;
      const float* of[4] = {};
      for (size_t i = 0; i < step; ++i) of[i] = x + (token + i) * inputs;
      float* to = out + token * outputs + slice * matrix.rows;
      step == 4 ? multiply_block<4>(matrix, slice, first, last, of, to, outputs)
                : multiply_block<1>(matrix, slice, first, last, of, to, outputs);
      token += step;
    }
  });
}

void RawExperts::run(const RawMatrix& gate_up, const RawMatrix& down, const float* rows, size_t count, float* out) {
  for (const RawMatrix* one : {&gate_up, &down}) {
    if (one->precision < 0 || one->precision >= kPrecisions || one->rows == 0 || one->columns == 0 ||
        one->slices == 0 || one->codes == nullptr || (one->precision != kFloat && one->scales == nullptr)) {
      refuse("an expert needs matrices with a known precision, rows, columns, codes, and scales unless they are fp32");
    }
    if (one->precision == kInt4 && one->columns % kGroup != 0) refuse("an int4 matrix has columns in groups of 32");
  }
  if (gate_up.columns != down.rows || gate_up.rows != 2 * down.columns || gate_up.slices != down.slices) {
    refuse("gate_up and down are no pair");
  }
  const size_t width = down.columns, pairs = count * down.slices;
  wide_.resize(pairs * 2 * width);
  narrow_.resize(pairs * width);
  multiply(gate_up, rows, count, wide_.data());
  for (size_t i = 0; i < pairs; ++i) {
    const float* gate = wide_.data() + i * 2 * width;
    silu_multiply(gate, gate + width, width, narrow_.data() + i * width);
  }
  multiply(down, narrow_.data(), count, out);
}

}  // namespace edgeflex
