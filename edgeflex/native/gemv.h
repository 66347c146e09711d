// Products of one input row with a packed matrix, reading weights as fast as memory gives them.
//
// XNNPACK's kernels for one row prefetch less than 1 KiB ahead, too little for weights that come from memory: on an
// AMD Zen 5 core they read 24 GB/s where a plain read loop reaches 38. These read XNNPACK's own packed layout,
// prefetch 6 KiB ahead, compute the very same numbers, and are used only where a probe shows exactly that.

#pragma once

#include <cstddef>
#include <cstdint>

namespace edgeflex {

struct QuantisedRow {
  int32_t zero_point;
  float scale;
};

// out[first..last) = rows first..last of the matrix times x. `first` is a multiple of kGemvRows.
using Gemv = void (*)(const uint8_t* x, QuantisedRow row, const uint8_t* packed, size_t first, size_t last,
                      size_t columns, float* out);
constexpr size_t kGemvRows = 64;

// The function for int8 or int4 weights with unsigned inputs, or null if this processor has none.
Gemv find_gemv(bool four_bits);

}  // namespace edgeflex
