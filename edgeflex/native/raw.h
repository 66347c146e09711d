// Experts computed from their raw numbers, where these lie.
//
// A GPU reads other layouts than XNNPACK's packed one. An expert that may be computed by either is kept once, in the
// bundle's own form, and the processor multiplies with that: codes become fp32 on the way, inputs are never rounded.
// So an expert's numbers are those that the GPU has, and it does not matter to a text which of the two computed it.

#pragma once

#include <vector>

#include "xnnpack.h"

namespace edgeflex {

// Codes and scales as a bundle stores them: fp32; int8 with an fp32 scale per row; int4, two codes a byte (value + 8,
// the even column in the low half), with a bfloat16 scale per 32 columns. At multiples of 4 bytes.
// It may lie in slices, each a matrix of its own in that form: of its rows, or, `across`, of its columns.
struct RawMatrix {
  int precision;
  size_t rows;     // of one slice
  size_t columns;  // of one slice
  const uint8_t* codes;
  const uint8_t* scales;
  size_t slices = 1;
  size_t pitch = 0;         // bytes from one slice's codes to the next one's
  size_t scales_pitch = 0;  // the same of scales
  bool across = false;
};

class RawExperts {
 public:
  explicit RawExperts(size_t threads);
  ~RawExperts();
  RawExperts(const RawExperts&) = delete;
  RawExperts& operator=(const RawExperts&) = delete;
  // out[count][hidden] = down * (silu(gate * row) * (up * row)) for each of rows[count][hidden]. A slice of gate_up is
  // some rows of gate and then the same ones of up, that of down the columns that take what they give.
  void run(const RawMatrix& gate_up, const RawMatrix& down, const float* rows, size_t count, float* out);

 private:
  template <typename Task>
  void parallel(size_t count, const Task& task);
  void multiply(const RawMatrix& matrix, const float* rows, size_t count, float* out);

  const Library& lib_;
  Pool pool_ = nullptr;
  std::vector<float> split_, wide_, narrow_;
};

}  // namespace edgeflex
