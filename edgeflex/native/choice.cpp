// Which kernels to use here: measured, and checked for their numbers.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "xnnpack.h"

namespace edgeflex {
namespace {

constexpr size_t kProbeRows = 328, kProbeColumns = 1024;  // not a multiple of any kernel's rows

struct Probe {
  std::vector<uint8_t> int8_codes, int4_codes;
  std::vector<float> int8_scales, input, weights8, weights4;
  std::vector<uint16_t> int4_scales;
};

Probe make_probe() {
  Probe probe;
  uint32_t state = 12345;
  const auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 8; };
  const size_t count = kProbeRows * kProbeColumns;
  for (size_t i = 0; i < count; ++i) {
    const int code = static_cast<int>(next() % 255) - 127;
    const int nibble = static_cast<int>(next() % 16);
    probe.int8_codes.push_back(static_cast<uint8_t>(code));
    if (i % 2 == 0) probe.int4_codes.push_back(static_cast<uint8_t>(nibble));
    else probe.int4_codes.back() |= static_cast<uint8_t>(nibble << 4);
    if (i % kGroup == 0) probe.int4_scales.push_back(static_cast<uint16_t>(0x3c00 + next() % 128));
    if (i % kProbeColumns == 0) probe.int8_scales.push_back(0.001f + 1e-6f * static_cast<float>(next() % 1000));
    probe.weights8.push_back(static_cast<float>(code) * probe.int8_scales.back());
    probe.weights4.push_back(static_cast<float>(nibble - 8) * from_bfloat16(probe.int4_scales.back()));
  }
  for (size_t i = 0; i < 3 * kProbeColumns; ++i) {
    probe.input.push_back(static_cast<float>(next() % 2001) * 1e-3f - 0.9f);
  }
  return probe;
}

struct Trial {
  bool usable = false;
  double seconds = 0.0;
  double error = 0.0;
  Buffer packed;
};

Trial try_form(Library& lib, const Probe& probe, int precision, int form) {
  Trial trial;
  const QuantisedFunctions& functions = lib.quantised[form];
  if (precision == kInt8 ? functions.create_int8 == nullptr : functions.create_int4 == nullptr) return trial;
  lib.activation[precision] = static_cast<Activation>(form);
  const void* codes = precision == kInt8 ? probe.int8_codes.data() : probe.int4_codes.data();
  const void* scales = probe.int8_scales.data();
  if (precision == kInt4) scales = probe.int4_scales.data();
  const std::vector<float>& weights = precision == kInt8 ? probe.weights8 : probe.weights4;
  std::vector<float> out(3 * kProbeRows);
  try {
    trial.packed = Buffer(measure_packed(lib, precision, form, kProbeRows, kProbeColumns));
    pack_as(lib, precision, form, kProbeRows, kProbeColumns, codes, scales, trial.packed.as<void>());
    Operator kernel(lib, precision, kProbeRows, kProbeColumns);
    Input input(lib, 3, kProbeColumns);
    Buffer workspace;
    input.set(probe.input.data(), 3, kProbeColumns);
    kernel.run(trial.packed.as<void>(), input, out.data(), nullptr, workspace);
    double wrong = 0.0, size = 0.0;
    for (size_t i = 0; i < out.size(); ++i) {
      const float* x = probe.input.data() + i / kProbeRows * kProbeColumns;
      const float* w = weights.data() + i % kProbeRows * kProbeColumns;
      double right = 0.0;
      for (size_t k = 0; k < kProbeColumns; ++k) right += static_cast<double>(x[k]) * w[k];
      wrong += (out[i] - right) * (out[i] - right);
      size += right * right;
    }
    trial.error = std::sqrt(wrong / size);
    if (!(trial.error < 0.05)) return trial;
    input.set(probe.input.data(), 1, kProbeColumns);
    trial.seconds = 1.0;
    for (int i = 0; i < 40; ++i) {
      const auto start = std::chrono::steady_clock::now();
      kernel.run(trial.packed.as<void>(), input, out.data(), nullptr, workspace);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      trial.seconds = std::min(trial.seconds, taken.count());
    }
    trial.usable = true;
  } catch (const Failure&) {
    return trial;  // no such kernel on this processor
  }
  return trial;
}

// Whether `gemv` gives exactly the operator's numbers, for whole matrices and for parts of them.
bool is_exact(Library& lib, const Probe& probe, int precision, Gemv gemv, const Buffer& packed) {
  Operator kernel(lib, precision, kProbeRows, kProbeColumns);
  Input input(lib, 1, kProbeColumns);
  Buffer workspace;
  std::vector<float> right(kProbeRows), got(kProbeRows);
  for (size_t r = 0; r < 3; ++r) {
    input.set(probe.input.data() + r * kProbeColumns, 1, kProbeColumns);
    kernel.run(packed.as<void>(), input, right.data(), nullptr, workspace);
    for (const size_t cut : {kProbeRows, 2 * kGemvRows}) {
      std::fill(got.begin(), got.end(), 0.0f);
      gemv(input.codes(kUnsigned), *input.params(kUnsigned), packed.as<uint8_t>(), 0, cut, kProbeColumns, got.data());
      gemv(input.codes(kUnsigned), *input.params(kUnsigned), packed.as<uint8_t>(), cut / kGemvRows * kGemvRows,
           kProbeRows, kProbeColumns, got.data());
      if (std::memcmp(got.data(), right.data(), kProbeRows * sizeof(float)) != 0) return false;
    }
  }
  return true;
}

uint64_t digest_of(const Buffer& buffer, size_t bytes, uint64_t state) {
  for (size_t i = 0; i < bytes; ++i) state = (state ^ buffer.as<uint8_t>()[i]) * 0x100000001b3u;  // FNV-1a
  return state;
}

// A kernel other than the usual one must be clearly faster, so that noise never changes the choice, and with it
// the packed weights, from one start to the next.
constexpr double kClearlyFaster = 1.6;
#if defined(__aarch64__)
constexpr int kUsualOrder[] = {kPacked, kSigned, kUnsigned};
#else
constexpr int kUsualOrder[] = {kUnsigned, kSigned, kPacked};
#endif

}  // namespace

void choose_kernels(Library& lib) {
  const Probe probe = make_probe();
  std::string names;
  uint64_t digest = 0xcbf29ce484222325u;
  for (const int precision : {kInt8, kInt4}) {
    Trial best;
    int chosen = -1;
    double error = 0.0;
    for (const int form : kUsualOrder) {
      Trial trial = try_form(lib, probe, precision, form);
      error = std::max(error, trial.error);
      if (!trial.usable || (chosen >= 0 && trial.seconds * kClearlyFaster > best.seconds)) continue;
      best = std::move(trial);
      chosen = form;
    }
    if (chosen < 0) {
      fail(std::string("no ") + (precision == kInt8 ? "int8" : "int4") +
           " kernel of this ExecuTorch library gives right numbers here (worst relative error " +
           std::to_string(error) + ", limit 0.05); install executorch 1.5");
    }
    lib.activation[precision] = static_cast<Activation>(chosen);
    const Gemv gemv = chosen == kUnsigned ? find_gemv(precision == kInt4) : nullptr;
    if (gemv != nullptr && is_exact(lib, probe, precision, gemv, best.packed)) lib.gemv[precision] = gemv;
    names += std::string("-") + kFormNames[chosen];
    digest = digest_of(best.packed, best.packed.bytes(), digest);
  }
  Buffer packed(measure_packed(lib, kFloat, kPlain, 64, 64));
  pack_as(lib, kFloat, kPlain, 64, 64, probe.weights8.data(), nullptr, packed.as<void>());
  digest = digest_of(packed, packed.bytes(), digest);
#if defined(__x86_64__)
  const char* machine = "x86_64";
#elif defined(__aarch64__)
  const char* machine = "aarch64";
#else
  const char* machine = "cpu";
#endif
  char tail[32];
  std::snprintf(tail, sizeof tail, "-%08x", static_cast<unsigned>((digest ^ (digest >> 32)) & 0xffffffffu));
  lib.kernel_id = machine + names + tail;
}

}  // namespace edgeflex
