// XNNPACK's operators, found in ExecuTorch's shared library at run time.
//
// ExecuTorch's wheel ships libexecutorch_backend_xnnpack.so, which exports XNNPACK's C functions but no headers.
// The declarations here follow XNNPACK's include/xnnpack.h and src/xnnpack/internal.h as of commit 92a7ad50
// (July 2026), the one that ExecuTorch 1.5 pins; a wrong one is found by the numbers check in `open_library`.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemv.h"

namespace edgeflex {

// What every function of the C interface returns. Negative values leave a text in `efx_error`.
enum Status : int { kOk = 0, kMissing = 1, kInputFault = -1, kDeviceFault = -2 };

struct Failure : std::runtime_error {
  Failure(Status code, const std::string& text) : std::runtime_error(text), status(code) {}
  Status status;
};

[[noreturn]] inline void refuse(const std::string& text) { throw Failure(kInputFault, text); }
[[noreturn]] inline void fail(const std::string& text) { throw Failure(kDeviceFault, text); }

enum Precision : int { kFloat = 0, kInt8 = 1, kInt4 = 2 };
constexpr int kPrecisions = 3;
constexpr size_t kGroup = 32;  // columns that share one int4 scale

// What a kernel reads as its input: fp32 rows; rows in signed or unsigned 8 bits with a zero point and scale each;
// or fp32 rows that the operator itself quantises and packs (kPacked, ARM).
enum Activation : int { kSigned = 0, kUnsigned = 1, kPacked = 2, kPlain = 3 };
inline constexpr const char* kFormNames[] = {"qd8", "qdu8", "qp8"};
constexpr int kQuantised = 2;  // kSigned and kUnsigned have buffers of their own

constexpr size_t kExtraRows = 16;    // kernels read this many QuantisedRow past the last row
constexpr size_t kExtraBytes = 128;  // and this many bytes past the last input

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

struct LookUpKey {
  uint32_t seed;
  const void* kernel;
  const void* bias;
  uint32_t fingerprint;
};

// XNNPACK asks these functions where packed weights lie.
struct CacheProvider {
  void* context;
  size_t (*look_up)(void*, const LookUpKey*);
  void* (*reserve_space)(void*, size_t);
  size_t (*look_up_or_insert)(void*, const LookUpKey*, void*, size_t);
  bool (*is_finalized)(void*);
  void* (*offset_to_addr)(void*, size_t);
  int (*delete_cache)(void*);
  int (*alias_data)(void*, void*, void*);
};

using Handle = void*;
using Pool = void*;

struct QuantisedFunctions {
  int (*create_int8)(size_t, size_t, size_t, size_t, const float*, const void*, const float*, float, float, uint32_t,
                     CacheProvider*, Handle*);
  int (*create_int4)(size_t, size_t, size_t, size_t, size_t, uint8_t, const uint16_t*, const void*, const float*, float,
                     float, uint32_t, CacheProvider*, Handle*);
  int (*reshape_int8)(Handle, size_t, size_t*, Pool);
  int (*reshape_int4)(Handle, size_t, size_t*, Pool);
  // The packed form (kPacked) takes no parameters; passing one argument more than it reads is harmless in the
  // calling conventions of x86-64 and AArch64.
  int (*setup_int8)(Handle, const void*, float*, void*, const QuantisedRow*);
  int (*setup_int4)(Handle, const void*, float*, void*, const QuantisedRow*);
  int (*create_convert)(uint32_t, Handle*);
  int (*reshape_convert)(Handle, size_t, size_t, size_t, size_t, Pool);
  int (*setup_convert)(Handle, const float*, void*, float*, QuantisedRow*);
};

struct Library {
  int (*initialize)(const void*);
  int (*run)(Handle, Pool);
  int (*destroy)(Handle);
  int (*create_float)(size_t, size_t, size_t, size_t, const float*, const float*, float, float, uint32_t,
                      CacheProvider*, Handle*);
  int (*reshape_float)(Handle, size_t, Pool);
  int (*setup_float)(Handle, const float*, float*);
  std::array<QuantisedFunctions, 3> quantised;  // by Activation

  Pool (*create_pool)(size_t);
  void (*destroy_pool)(Pool);
  void (*parallel)(Pool, void (*)(void*, size_t, size_t), void*, size_t, uint32_t);  // task(context, thread, index)

  std::array<Activation, kPrecisions> activation;  // the form that each precision's kernels take here
  std::array<Gemv, kPrecisions> gemv;  // for one input row; null: the operator does it
  std::string kernel_id;
};

// Opens ExecuTorch's libraries once per process; later calls return the same. Measures which kernels to use and
// checks their numbers.
const Library& open_library(const std::string& backend, const std::string& threadpool);
const Library& library();  // the opened one, or a fault

// Sets `activation` and `kernel_id`.
void choose_kernels(Library& lib);

// With the activation form said, before it is chosen.
size_t measure_packed(const Library& lib, int precision, int form, size_t rows, size_t columns);
void pack_as(const Library& lib, int precision, int form, size_t rows, size_t columns, const void* codes,
             const void* scales, void* out);

size_t packed_bytes(const Library& lib, int precision, size_t rows, size_t columns);
void pack(const Library& lib, int precision, size_t rows, size_t columns, const void* codes, const void* scales,
          void* out);

// Page-aligned zeroed memory, given back when it goes out of scope. Pages are only taken when written.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { release(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  void prefer_huge_pages() const;

 private:
  void release() noexcept;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Input rows of matrices, quantised at most once for each form that a kernel asks for.
class Input {
 public:
  Input() = default;
  Input(const Library& lib, size_t rows, size_t columns);
  void set(const float* values, size_t rows, size_t columns);
  void quantise(const Library& lib, int form, Pool pool);
  // Makes this the rows `which` of `other`, in the form given only.
  void gather(const Input& other, int form, const int32_t* which, size_t rows);

  const float* values = nullptr;
  size_t rows = 0;
  size_t columns = 0;
  std::array<bool, kQuantised> ready{};
  size_t bytes() const;
  uint8_t* codes(int form) const { return forms_[form].codes.as<uint8_t>(); }
  QuantisedRow* params(int form) const { return forms_[form].params.as<QuantisedRow>(); }

 private:
  struct Form {
    Buffer codes;
    Buffer params;
    std::shared_ptr<void> convert;
  };
  std::array<Form, kQuantised> forms_;
  Buffer gathered_;
  size_t capacity_ = 0;  // rows
  size_t widest_ = 0;    // columns
};

// One XNNPACK operator for one shape and precision. Where its weights lie is said anew at every run, so that one
// operator serves every matrix of its shape, wherever it lies, and binding an expert costs nothing.
class Operator {
 public:
  Operator(const Library& lib, int precision, size_t rows, size_t columns);
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;
  ~Operator();
  // out[rows][this->rows] = input * packed^T
  void run(const void* packed, Input& input, float* out, Pool pool, Buffer& workspace);

  // The same for one quantised input row and the matrix's rows first..last; only where `lib.gemv` has it.
  void run_rows(const void* packed, const uint8_t* x, QuantisedRow row, size_t first, size_t last, float* out) const {
    lib_.gemv[precision](x, row, static_cast<const uint8_t*>(packed), first, last, columns, out);
  }
  bool has_gemv() const { return lib_.gemv[precision] != nullptr; }
  int form() const { return lib_.activation[precision]; }

  const int precision;
  const size_t rows;
  const size_t columns;
  const size_t packed_bytes;

 private:
  const Library& lib_;
  CacheProvider provider_{};
  const void* packed_ = nullptr;
  Handle handle_ = nullptr;
};

}  // namespace edgeflex
