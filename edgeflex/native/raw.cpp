#include "raw.h"

#include <algorithm>

#include "kernels.h"

namespace edgeflex {
namespace {

constexpr size_t kTask = 64;  // matrix rows that a thread takes at a time
constexpr int kRows = 4;      // of those, summed up at a time
constexpr int kLane = 16;
constexpr size_t kLine = 64;       // bytes of a cache line
constexpr size_t kBlock = 512;     // columns between which the next rows' bytes are asked for
constexpr size_t kWide = 256;      // columns of a slice that are many
constexpr size_t kAhead = 16 << 10;  // bytes of rows in slices that are asked for while as many are summed up

typedef float Wide __attribute__((vector_size(kLane * sizeof(float))));
typedef float Eight __attribute__((vector_size(kLane / 2 * sizeof(float))));
typedef float Four __attribute__((vector_size(kLane / 4 * sizeof(float))));
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
  Eight halves[2];
  std::memcpy(halves, &value, sizeof halves);
  const Eight eight = halves[0] + halves[1];
  Four quarters[2];
  std::memcpy(quarters, &eight, sizeof quarters);
  const Four four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The even and the odd columns of a group, as floats.
inline void unpack(const uint8_t* codes, Wide& even, Wide& odd) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  even = (Wide)_mm512_permutexvar_ps(pair, values);  // which looks at four bits
  odd = (Wide)_mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), values);
#else
  const Unsigned pair = read<Unsigned>(codes);
  even = widen((Bytes)((pair & 15) - 8));
  odd = widen((Bytes)((pair >> 4) - 8));
#endif
}

constexpr size_t code_bytes(int precision, size_t columns) {
  return precision == kInt4 ? columns / 2 : precision == kInt8 ? columns : columns * sizeof(float);
}

constexpr size_t scale_bytes(int precision, size_t columns) { return precision == kInt4 ? columns / kGroup * 2 : 0; }

// Sums of N matrix rows for R inputs: sixteen lanes, and columns that fill none.
template <int R, int N>
struct Sums {
  Wide lanes[N][R];
  float tails[N][R];
};

// Asks for bytes that are needed soon: rows are short, and lie apart in slices, so that the processor does not see
// what comes.
inline void ask_for(const uint8_t* from, size_t size) {
  for (size_t byte = 0; byte < size; byte += kLine) __builtin_prefetch(from + byte);
}

// Adds the products of some columns of N rows, which lie `below` bytes apart and their scales `scales_below`: inputs
// are read once for all, and no row's sums wait for another's. For int4 `x` holds, for each 32 columns, the 16 even
// ones and then the 16 odd ones.
template <int P, int R, int N>
inline void add_columns(const uint8_t* codes, size_t below, const uint8_t* scales, size_t scales_below,
                        const float* const* x, size_t from, size_t to, Sums<R, N>& kept) {
  Wide sums[N][R];
  std::memcpy(sums, kept.lanes, sizeof sums);
  size_t k = from;
  if (P == kInt4) {
    for (; k < to; k += kGroup) {
      Wide even[N], odd[N];
      for (int i = 0; i < N; ++i) unpack(codes + i * below + k / 2, even[i], odd[i]);
      for (int r = 0; r < R; ++r) {
        const Wide first = read<Wide>(x[r] + k), second = read<Wide>(x[r] + k + kLane);
        for (int i = 0; i < N; ++i) {
          const float scale = from_bfloat16(read<uint16_t>(scales + i * scales_below + k / kGroup * 2));
          sums[i][r] += scale * (even[i] * first + odd[i] * second);
        }
      }
    }
  } else {
    for (; k + kLane <= to; k += kLane) {
      Wide weights[N];
      for (int i = 0; i < N; ++i) {
        const uint8_t* place = codes + i * below;
        weights[i] = P == kInt8 ? widen(read<Bytes>(place + k)) : read<Wide>(place + k * sizeof(float));
      }
      for (int r = 0; r < R; ++r) {
        const Wide input = read<Wide>(x[r] + k);
        for (int i = 0; i < N; ++i) sums[i][r] += weights[i] * input;
      }
    }
  }
  std::memcpy(kept.lanes, sums, sizeof sums);
  for (; k < to; ++k) {
    for (int i = 0; i < N; ++i) {
      const uint8_t* place = codes + i * below;
      const float weight = P == kInt8 ? static_cast<float>(static_cast<int8_t>(place[k]))
                                      : read<float>(place + k * sizeof(float));
      for (int r = 0; r < R; ++r) kept.tails[i][r] += weight * x[r][k];
    }
  }
}

// Adds the products of N rows of one slice that follow each other, and asks for as many after them.
template <int P, int R, int N>
inline void add_rows(const uint8_t* codes, const uint8_t* scales, const float* const* x, size_t columns,
                     Sums<R, N>& sums) {
  const size_t below = code_bytes(P, columns), scales_below = scale_bytes(P, columns);
  if (P == kInt4) ask_for(scales + N * scales_below, N * scales_below);
  if (columns <= kBlock) {
    ask_for(codes + N * below, N * below);
    add_columns<P, R, N>(codes, below, scales, scales_below, x, 0, columns, sums);
    return;
  }
  for (size_t from = 0; from < columns; from += kBlock) {
    const size_t to = std::min(from + kBlock, columns);
    for (int i = N; i < 2 * N; ++i) ask_for(codes + i * below + code_bytes(P, from), code_bytes(P, to - from));
    add_columns<P, R, N>(codes, below, scales, scales_below, x, from, to, sums);
  }
}

template <int P, int R, int N>
inline void finish_rows(const RawMatrix& m, size_t slice, size_t row, const Sums<R, N>& sums, float* out,
                        size_t outputs) {
  for (int i = 0; i < N; ++i) {
    float scale = 1.0f;
    if (P == kInt8) scale = read<float>(m.scales + slice * m.scales_pitch + (row + i) * sizeof(float));
    for (int r = 0; r < R; ++r) out[r * outputs + row + i] = (total(sums.lanes[i][r]) + sums.tails[i][r]) * scale;
  }
}

// N rows from `row` on of one slice, whose outputs are its own.
template <int P, int R, int N>
inline void multiply_rows(const RawMatrix& m, size_t slice, size_t row, const float* const* x, float* out,
                          size_t outputs) {
  Sums<R, N> sums = {};
  add_rows<P, R, N>(m.codes + slice * m.pitch + row * code_bytes(P, m.columns),
                    m.scales + slice * m.scales_pitch + row * scale_bytes(P, m.columns), x, m.columns, sums);
  finish_rows<P, R, N>(m, slice, row, sums, out, outputs);
}

// Asks for rows of all slices, N of one slice at a time, in the order in which they lie: some of the first slice, the
// same ones of the next, and after the last slice the rows that follow.
template <int P, int N>
class Ahead {
 public:
  // From as many rows after `row` on as are asked for of one slice.
  Ahead(const RawMatrix& m, size_t row) : m_(m), step_(N * code_bytes(P, m.columns)) {
    while (steps_ > 1 && steps_ * step_ * m.slices > kAhead) steps_ /= 2;
    codes_ = m.codes + (row / N + steps_) * step_;
    scales_ = m.scales + (row / N + steps_) * scales_step();
    left_ = steps_;
  }

  inline void next() {
    ask_for(codes_, step_);
    codes_ += step_;
    if (P == kInt4) __builtin_prefetch(scales_);
    scales_ += scales_step();
    if (--left_ > 0) return;
    left_ = steps_;
    move(1);
    if (++slice_ < m_.slices) return;
    slice_ = 0;
    move(-m_.slices);
    codes_ += steps_ * step_;
    scales_ += steps_ * scales_step();
  }

 private:
  size_t scales_step() const { return N * scale_bytes(P, m_.columns); }

  // To the same rows of another slice; what was asked for of this one is taken back when it is a slice on.
  void move(size_t slices) {
    const size_t back = slices == 1 ? steps_ : 0;
    codes_ += slices * m_.pitch - back * step_;
    scales_ += slices * m_.scales_pitch - back * scales_step();
  }

  const RawMatrix& m_;
  const size_t step_;
  const uint8_t *codes_, *scales_;
  size_t steps_ = kTask / N, left_, slice_ = 0;
};

// N rows from `row` on of all slices together, which are columns: a sum goes on from slice to slice, so that it is the
// undivided matrix's.
template <int P, int R, int N, typename Later>
inline void multiply_across(const RawMatrix& m, size_t row, const float* const* x, float* out, size_t outputs,
                            Later& ahead) {
  const size_t below = code_bytes(P, m.columns), scales_below = scale_bytes(P, m.columns);
  const uint8_t *codes = m.codes + row * below, *scales = m.scales + row * scales_below;
  const float* inputs[R];
  for (int r = 0; r < R; ++r) inputs[r] = x[r];
  Sums<R, N> sums = {};
  for (size_t slice = 0; slice < m.slices; ++slice, codes += m.pitch, scales += m.scales_pitch) {
    ahead.next();
    add_columns<P, R, N>(codes, below, scales, scales_below, inputs, 0, m.columns, sums);
    for (int r = 0; r < R; ++r) inputs[r] += m.columns;
  }
  finish_rows<P, R, N>(m, 0, row, sums, out, outputs);
}

// A task's rows of all slices together, where a row has so many columns of a slice that sums put aside cost little: slice
// by slice as they lie. Returns the first row that is left.
template <int P, int R, int N>
size_t multiply_in_order(const RawMatrix& m, size_t first, size_t last, const float* const* x, float* out,
                         size_t outputs) {
  const size_t below = code_bytes(P, m.columns), scales_below = scale_bytes(P, m.columns), steps = (last - first) / N;
  Sums<R, N> sums[kTask / N] = {};
  for (size_t slice = 0; slice < m.slices; ++slice) {
    const uint8_t *codes = m.codes + slice * m.pitch, *scales = m.scales + slice * m.scales_pitch;
    const float* inputs[R];
    for (int r = 0; r < R; ++r) inputs[r] = x[r] + slice * m.columns;
    for (size_t step = 0; step < steps; ++step) {
      const size_t row = first + step * N;
      add_rows<P, R, N>(codes + row * below, scales + row * scales_below, inputs, m.columns, sums[step]);
    }
  }
  for (size_t step = 0; step < steps; ++step) {
    finish_rows<P, R, N>(m, 0, first + step * N, sums[step], out, outputs);
  }
  return first + steps * N;
}

template <int P, int R>
void multiply_some(const RawMatrix& m, size_t slice, size_t first, size_t last, const float* const* x, float* out,
                   size_t outputs) {
  constexpr int N = R == 1 ? kRows : 2;
  size_t row = first;
  if (m.across && m.slices > 1) {
    if (m.columns >= kWide) row = multiply_in_order<P, R, N>(m, first, last, x, out, outputs);
    Ahead<P, N> ahead(m, row);
    for (; row + N <= last; row += N) multiply_across<P, R, N>(m, row, x, out, outputs, ahead);
    for (; row < last; ++row) multiply_across<P, R, 1>(m, row, x, out, outputs, ahead);
    return;
  }
  for (; row + N <= last; row += N) multiply_rows<P, R, N>(m, slice, row, x, out, outputs);
  for (; row < last; ++row) multiply_rows<P, R, 1>(m, slice, row, x, out, outputs);
}

template <int R>
void multiply_block(const RawMatrix& m, size_t slice, size_t first, size_t last, const float* const* x, float* out,
                    size_t outputs) {
  if (m.precision == kInt4) {
    multiply_some<kInt4, R>(m, slice, first, last, x, out, outputs);
  } else if (m.precision == kInt8) {
    multiply_some<kInt8, R>(m, slice, first, last, x, out, outputs);
  } else {
    multiply_some<kFloat, R>(m, slice, first, last, x, out, outputs);
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
