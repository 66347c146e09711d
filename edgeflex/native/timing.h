// How long one matrix takes here with its weights in memory rather than in a cache.

#pragma once

#include <cstddef>

namespace edgeflex {

// Median seconds of `rows_in` input rows times one matrix, over enough copies of it that no cache holds them.
double time_matrix(int precision, size_t rows, size_t columns, size_t rows_in, size_t threads, size_t total_bytes);

}  // namespace edgeflex
