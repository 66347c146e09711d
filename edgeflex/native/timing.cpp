#include "timing.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "xnnpack.h"

namespace edgeflex {
namespace {

constexpr size_t kTask = 64;  // rows of a matrix that a thread takes at a time
constexpr size_t kLeastSamples = 9, kMostSamples = 200;
constexpr double kEnough_s = 0.15;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Raw numbers that every precision takes: codes that vary, scales that are all alike.
struct Raw {
  std::vector<uint8_t> codes;
  std::vector<uint8_t> scales;

  Raw(int precision, size_t rows, size_t columns) {
    const size_t count = rows * columns;
    if (precision == kFloat) {
      codes.resize(count * sizeof(float));
      auto* values = reinterpret_cast<float*>(codes.data());
      for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 17) * 0.01f - 0.08f;
      return;
    }
    codes.resize(precision == kInt8 ? count : count / 2);
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 37 + 11);
    if (precision == kInt8) {
      scales.resize(rows * sizeof(float));
      std::fill_n(reinterpret_cast<float*>(scales.data()), rows, 1e-3f);
    } else {
      scales.resize(count / kGroup * sizeof(uint16_t));
      std::fill_n(reinterpret_cast<uint16_t*>(scales.data()), count / kGroup, static_cast<uint16_t>(0x3a83));  // 1e-3
    }
  }
};

struct Product {
  const Operator* kernel;
  const uint8_t* packed;
  const uint8_t* x;
  QuantisedRow row;
  float* out;

  static void part(void* context, size_t, size_t task) {
    const auto& self = *static_cast<const Product*>(context);
    const size_t first = task * kTask;
    self.kernel->run_rows(self.packed, self.x, self.row, first, std::min(first + kTask, self.kernel->rows), self.out);
  }
};

}  // namespace

double time_matrix(int precision, size_t rows, size_t columns, size_t rows_in, size_t threads, size_t total_bytes) {
  const Library& lib = library();
  Operator kernel(lib, precision, rows, columns);
  const size_t stride = (kernel.packed_bytes + 4095) / 4096 * 4096;
  const size_t copies = std::max<size_t>(1, total_bytes / stride);
  Buffer weights(copies * stride);
  weights.prefer_huge_pages();
  const Raw raw(precision, rows, columns);
  pack(lib, precision, rows, columns, raw.codes.data(), raw.scales.data(), weights.as<uint8_t>());
  for (size_t i = 1; i < copies; ++i) {
    std::memcpy(weights.as<uint8_t>() + i * stride, weights.as<uint8_t>(), kernel.packed_bytes);
  }
  std::vector<float> values(rows_in * columns), out(rows_in * rows);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 29) * 0.07f - 1.0f;
  const std::shared_ptr<void> pool(threads > 1 ? lib.create_pool(threads) : nullptr,
                                   [&lib](void* one) { if (one != nullptr) lib.destroy_pool(one); });
  Input input(lib, rows_in, columns);
  Buffer workspace;
  std::vector<double> samples;
  const Clock::time_point begun = Clock::now();
  while (samples.size() < kMostSamples && (samples.size() < kLeastSamples || seconds_since(begun) < kEnough_s)) {
    const uint8_t* packed = weights.as<uint8_t>() + samples.size() % copies * stride;
    const Clock::time_point start = Clock::now();
    input.set(values.data(), rows_in, columns);
    if (rows_in > 1 || !kernel.has_gemv()) {
      kernel.run(packed, input, out.data(), pool.get(), workspace);
    } else {
      input.quantise(lib, kernel.form(), pool.get());
      Product product{&kernel, packed, input.codes(kernel.form()), *input.params(kernel.form()), out.data()};
      const size_t tasks = (rows + kTask - 1) / kTask;
      if (pool == nullptr) {
        for (size_t task = 0; task < tasks; ++task) Product::part(&product, 0, task);
      } else {
        lib.parallel(pool.get(), Product::part, &product, tasks, 0);
      }
    }
    samples.push_back(seconds_since(start));
  }
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2];
}

}  // namespace edgeflex
