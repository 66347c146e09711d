#include "xnnpack.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

namespace edgeflex {
namespace {

constexpr size_t kNotFound = SIZE_MAX;
constexpr uint32_t kInlinePacking = 0x00000200;  // XNN_FLAG_INLINE_LHS_PACKING
const char* const kStatusNames[] = {"success",           "uninitialized",        "invalid parameter", "invalid state",
                                    "unsupported parameter", "unsupported hardware", "out of memory"};

std::string describe(int status) {
  return status >= 0 && status < 7 ? kStatusNames[status] : "status " + std::to_string(status);
}

void check(int status, const char* what) {
  if (status != 0) fail(std::string("XNNPACK could not ") + what + ": " + describe(status));
}

// --- where packed weights lie -------------------------------------------------------------------------------

struct PackTarget {
  void* out;
  size_t bytes;
};

size_t never_found(void*, const LookUpKey*) { return kNotFound; }
void* give_target(void* context, size_t bytes) {
  auto* target = static_cast<PackTarget*>(context);
  target->bytes = bytes;
  return target->out;  // null when only the size is asked for: the operator is then not made
}
size_t accept(void*, const LookUpKey*, void*, size_t) { return 0; }
bool finalised(void*) { return true; }
void* target_address(void* context, size_t) { return static_cast<PackTarget*>(context)->out; }
int keep(void*) { return 0; }
int no_alias(void*, void*, void*) { return 0; }

size_t always_found(void*, const LookUpKey*) { return 0; }
void* no_space(void*, size_t) { return nullptr; }
void* current_address(void* context, size_t) { return const_cast<void*>(*static_cast<const void**>(context)); }

int create(const Library& lib, int precision, int form, size_t rows, size_t columns, const void* codes,
           const void* scales, CacheProvider* provider, Handle* handle) {
  const float lowest = -INFINITY, highest = INFINITY;
  if (precision == kFloat) {
    return lib.create_float(columns, rows, columns, rows, static_cast<const float*>(codes), nullptr, lowest, highest,
                            0, provider, handle);
  }
  const QuantisedFunctions& functions = lib.quantised[form];
  const uint32_t flags = form == kPacked ? kInlinePacking : 0;
  if (precision == kInt8) {
    return functions.create_int8(columns, rows, columns, rows, static_cast<const float*>(scales), codes, nullptr,
                                 lowest, highest, flags, provider, handle);
  }
  return functions.create_int4(columns, rows, columns, rows, kGroup, 8, static_cast<const uint16_t*>(scales), codes,
                               nullptr, lowest, highest, flags, provider, handle);
}

CacheProvider packing_provider(PackTarget* target) {
  return {target, never_found, give_target, accept, finalised, target_address, keep, no_alias};
}

void check_shape(int precision, size_t rows, size_t columns) {
  if (precision < 0 || precision >= kPrecisions) refuse("precision " + std::to_string(precision) + " is unknown");
  const std::string shape = std::to_string(rows) + " x " + std::to_string(columns);
  if (rows == 0 || columns == 0 || rows > (size_t{1} << 31) || columns > (size_t{1} << 31)) {
    refuse("a matrix of " + shape + " has no kernel; give between 1 and 2^31 rows and columns");
  }
  if (precision == kInt4 && columns % kGroup != 0) {
    refuse("an int4 matrix of " + shape +
           " cannot be packed: columns come in groups of 32; store it in another precision");
  }
}

}  // namespace

size_t measure_packed(const Library& lib, int precision, int form, size_t rows, size_t columns) {
  check_shape(precision, rows, columns);
  PackTarget target{nullptr, 0};
  CacheProvider provider = packing_provider(&target);
  Handle handle = nullptr;
  // The scales are checked before the space is reserved; their values do not matter here.
  std::vector<uint16_t> ones(precision == kInt4 ? rows * (columns / kGroup) : 0, 0x3f80);
  const int status = create(lib, precision, form, rows, columns, ones.data(), ones.data(), &provider, &handle);
  if (target.bytes == 0) check(status == 0 ? 2 : status, "tell the packed size of a matrix");
  return target.bytes;
}

void pack_as(const Library& lib, int precision, int form, size_t rows, size_t columns, const void* codes,
             const void* scales, void* out) {
  check_shape(precision, rows, columns);
  std::memset(out, 0, measure_packed(lib, precision, form, rows, columns));  // so that padding is the same each time
  PackTarget target{out, 0};
  CacheProvider provider = packing_provider(&target);
  Handle handle = nullptr;
  check(create(lib, precision, form, rows, columns, codes, scales, &provider, &handle), "pack a matrix");
  lib.destroy(handle);
}

namespace {

// XNNPACK refuses scales that are zero or subnormal, which all-zero rows have. Their codes become zero and their
// scale one: the same numbers.
template <typename Scale, typename Value>
bool mend(size_t count, const Scale* scales, std::vector<Scale>& mended, Scale one, Value value_of,
          std::vector<size_t>& zeroed) {
  for (size_t i = 0; i < count; ++i) {
    const float value = value_of(scales[i]);
    if (!(value >= 0.0f) || std::isinf(value)) {
      refuse("scale " + std::to_string(i) + " is " + std::to_string(value) + "; scales are finite and not negative");
    }
    if (std::isnormal(value)) continue;
    if (mended.empty()) mended.assign(scales, scales + count);
    mended[i] = one;
    zeroed.push_back(i);
  }
  return !zeroed.empty();
}

// --- opening ------------------------------------------------------------------------------------------------

template <typename Function>
void find(void* handle, const std::string& name, Function& function, std::string* absent) {
  void* symbol = dlsym(handle, name.c_str());
  std::memcpy(&function, &symbol, sizeof function);
  if (symbol == nullptr && absent != nullptr) *absent += (absent->empty() ? "" : ", ") + name;
}

void* open_file(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    fail("ExecuTorch's library does not open: " + std::string(why ? why : path) + "; install executorch 1.5");
  }
  return handle;
}

void find_all(Library& lib, void* backend, void* threads) {
  std::string absent;
  find(backend, "xnn_initialize", lib.initialize, &absent);
  find(backend, "xnn_run_operator", lib.run, &absent);
  find(backend, "xnn_delete_operator", lib.destroy, &absent);
  find(backend, "xnn_create_fully_connected_nc_f32", lib.create_float, &absent);
  find(backend, "xnn_reshape_fully_connected_nc_f32", lib.reshape_float, &absent);
  find(backend, "xnn_setup_fully_connected_nc_f32", lib.setup_float, &absent);
  for (const int form : {kSigned, kUnsigned, kPacked}) {
    // Only the signed form is in every XNNPACK; the others are used where they are found.
    std::string* needed = form == kSigned ? &absent : nullptr;
    QuantisedFunctions& functions = lib.quantised[form];
    const std::string middle = std::string("_fully_connected_nc_") + kFormNames[form] + "_f32_";
    find(backend, "xnn_create" + middle + "qc8w", functions.create_int8, needed);
    find(backend, "xnn_reshape" + middle + "qc8w", functions.reshape_int8, needed);
    find(backend, "xnn_setup" + middle + "qc8w", functions.setup_int8, needed);
    find(backend, "xnn_create" + middle + "qb4w", functions.create_int4, needed);
    find(backend, "xnn_reshape" + middle + "qb4w", functions.reshape_int4, needed);
    find(backend, "xnn_setup" + middle + "qb4w", functions.setup_int4, needed);
    if (form == kPacked) continue;
    const std::string convert = std::string("_convert_nc_f32_") + kFormNames[form];
    find(backend, "xnn_create" + convert, functions.create_convert, needed);
    find(backend, "xnn_reshape" + convert, functions.reshape_convert, needed);
    find(backend, "xnn_setup" + convert, functions.setup_convert, needed);
    if (functions.create_convert == nullptr) functions = {};
  }
  find(threads, "pthreadpool_create", lib.create_pool, &absent);
  find(threads, "pthreadpool_destroy", lib.destroy_pool, &absent);
  find(threads, "pthreadpool_parallelize_1d_with_thread", lib.parallel, &absent);
  if (!absent.empty()) fail("ExecuTorch's library lacks " + absent + "; install executorch 1.5");
}

std::mutex opening;
std::unique_ptr<Library> opened;

}  // namespace

const Library& open_library(const std::string& backend, const std::string& threadpool) {
  const std::lock_guard<std::mutex> lock(opening);
  if (opened) return *opened;
  auto lib = std::make_unique<Library>();
  void* threads = open_file(threadpool);
  find_all(*lib, open_file(backend), threads);
  check(lib->initialize(nullptr), "start");
  lib->activation = {kPlain, kSigned, kSigned};
  lib->gemv = {};
  choose_kernels(*lib);
  opened = std::move(lib);
  return *opened;
}

const Library& library() {
  const std::lock_guard<std::mutex> lock(opening);
  if (!opened) refuse("ExecuTorch's library is not open yet; call efx_open first");
  return *opened;
}

size_t packed_bytes(const Library& lib, int precision, size_t rows, size_t columns) {
  check_shape(precision, rows, columns);
  return measure_packed(lib, precision, lib.activation[precision], rows, columns);
}

void pack(const Library& lib, int precision, size_t rows, size_t columns, const void* codes, const void* scales,
          void* out) {
  check_shape(precision, rows, columns);
  std::vector<size_t> zeroed;
  std::vector<uint8_t> changed;
  std::vector<float> scales8;
  std::vector<uint16_t> scales4;
  const auto* bytes = static_cast<const uint8_t*>(codes);
  if (precision == kInt8) {
    const auto* given = static_cast<const float*>(scales);
    if (mend(rows, given, scales8, 1.0f, [](float value) { return value; }, zeroed)) {
      changed.assign(bytes, bytes + rows * columns);
      for (const size_t row : zeroed) std::memset(changed.data() + row * columns, 0, columns);
      scales = scales8.data();
    }
  } else if (precision == kInt4) {
    const auto* given = static_cast<const uint16_t*>(scales);
    if (mend(rows * columns / kGroup, given, scales4, uint16_t{0x3f80}, from_bfloat16, zeroed)) {
      changed.assign(bytes, bytes + rows * columns / 2);
      for (const size_t group : zeroed) std::memset(changed.data() + group * kGroup / 2, 0x88, kGroup / 2);
      scales = scales4.data();
    }
  }
  pack_as(lib, precision, lib.activation[precision], rows, columns, changed.empty() ? codes : changed.data(), scales,
          out);
}

// --- memory -------------------------------------------------------------------------------------------------

Buffer::Buffer(size_t bytes) : bytes_((bytes + 4095) / 4096 * 4096) {
  if (bytes_ == 0) return;
  data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    fail("no memory for " + std::to_string(bytes_) + " bytes; give a shorter context or a smaller chunk");
  }
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  release();
  data_ = other.data_;
  bytes_ = other.bytes_;
  other.data_ = nullptr;
  other.bytes_ = 0;
  return *this;
}

void Buffer::release() noexcept {
  if (data_ != nullptr) munmap(data_, bytes_);
  data_ = nullptr;
}

void Buffer::prefer_huge_pages() const {
#if defined(MADV_HUGEPAGE)
  // those wholly inside: one that reached beyond the buffer would hold memory that nobody counts
  const uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data_) + huge - 1) / huge * huge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data_) + bytes_) / huge * huge;
  // a wish: refusal changes nothing but speed
  if (data_ != nullptr && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// --- inputs -------------------------------------------------------------------------------------------------

Input::Input(const Library& lib, size_t rows_capacity, size_t columns_capacity)
    : capacity_(rows_capacity), widest_(columns_capacity) {
  for (const int precision : {kInt8, kInt4}) {
    const int form = lib.activation[precision];
    if (form >= kQuantised || forms_[form].convert) continue;
    Handle convert = nullptr;
    check(lib.quantised[form].create_convert(0, &convert), "make a conversion");
    const auto destroy = lib.destroy;
    forms_[form].convert = std::shared_ptr<void>(convert, [destroy](void* handle) { destroy(handle); });
    forms_[form].codes = Buffer(capacity_ * widest_ + kExtraBytes);
    forms_[form].params = Buffer((capacity_ + kExtraRows) * sizeof(QuantisedRow));
  }
}

void Input::set(const float* from, size_t row_count, size_t column_count) {
  if (row_count > capacity_ || column_count > widest_) fail("an input is larger than its buffer");
  values = from;
  rows = row_count;
  columns = column_count;
  ready = {};
}

void Input::quantise(const Library& lib, int form, Pool pool) {
  if (form >= kQuantised || ready[form]) return;
  const QuantisedFunctions& functions = lib.quantised[form];
  const Handle convert = forms_[form].convert.get();
  check(functions.reshape_convert(convert, rows, columns, columns, columns, pool), "shape a conversion");
  check(functions.setup_convert(convert, values, codes(form), nullptr, params(form)), "set up a conversion");
  check(lib.run(convert, pool), "convert an input");
  ready[form] = true;
}

void Input::gather(const Input& other, int form, const int32_t* which, size_t row_count) {
  columns = other.columns;
  rows = row_count;
  ready = {};
  values = nullptr;
  if (form >= kQuantised) {
    if (gathered_.bytes() == 0) gathered_ = Buffer(capacity_ * widest_ * sizeof(float) + kExtraBytes);
    float* out = gathered_.as<float>();
    for (size_t i = 0; i < rows; ++i) {
      std::memcpy(out + i * columns, other.values + which[i] * columns, columns * sizeof(float));
    }
    values = out;
    return;
  }
  for (size_t i = 0; i < rows; ++i) {
    std::memcpy(codes(form) + i * columns, other.codes(form) + which[i] * columns, columns);
    params(form)[i] = other.params(form)[which[i]];
  }
  for (size_t i = 0; i < kExtraRows; ++i) params(form)[rows + i] = params(form)[rows - 1];
  ready[form] = true;
}

size_t Input::bytes() const {
  size_t total = gathered_.bytes();
  for (const Form& form : forms_) total += form.codes.bytes() + form.params.bytes();
  return total;
}

// --- operators ----------------------------------------------------------------------------------------------

Operator::Operator(const Library& lib, int precision_, size_t rows_, size_t columns_)
    : precision(precision_),
      rows(rows_),
      columns(columns_),
      packed_bytes(measure_packed(lib, precision_, lib.activation[precision_], rows_, columns_)),
      lib_(lib) {
  provider_ = {&packed_, always_found, no_space, accept, finalised, current_address, keep, no_alias};
  // Weights and scales are already packed; only the scales' values are looked at, so any good ones will do.
  std::vector<uint16_t> halves(precision == kInt4 ? rows * (columns / kGroup) : 0, 0x3f80);
  std::vector<float> singles(precision == kInt8 ? rows : 1, 1.0f);
  const void* scales = precision == kInt4 ? static_cast<const void*>(halves.data()) : singles.data();
  check(create(lib_, precision, form(), rows, columns, singles.data(), scales, &provider_, &handle_),
        "make an operator");
}

Operator::~Operator() {
  if (handle_ != nullptr) lib_.destroy(handle_);
}

void Operator::run(const void* packed, Input& input, float* out, Pool pool, Buffer& workspace) {
  if (input.columns != columns) fail("an input's width does not fit its matrix");
  packed_ = packed;
  if (precision == kFloat) {
    check(lib_.reshape_float(handle_, input.rows, pool), "shape an operator");
    check(lib_.setup_float(handle_, input.values, out), "set up an operator");
  } else {
    const int form = lib_.activation[precision];
    const QuantisedFunctions& functions = lib_.quantised[form];
    input.quantise(lib_, form, pool);
    const void* from = form < kQuantised ? static_cast<const void*>(input.codes(form)) : input.values;
    const QuantisedRow* params = form < kQuantised ? input.params(form) : nullptr;
    size_t needed = 0;
    check((precision == kInt8 ? functions.reshape_int8 : functions.reshape_int4)(handle_, input.rows, &needed, pool),
          "shape an operator");
    if (needed > workspace.bytes()) workspace = Buffer(needed + kExtraBytes);
    check((precision == kInt8 ? functions.setup_int8 : functions.setup_int4)(handle_, from, out,
                                                                             workspace.as<void>(), params),
          "set up an operator");
  }
  check(lib_.run(handle_, pool), "run an operator");
}

}  // namespace edgeflex
