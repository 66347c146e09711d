// The C interface, called from edgeflex/runtimes/native.py. No exception crosses it.

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "decoder.h"
#include "raw.h"
#include "timing.h"

#define EFX __attribute__((visibility("default")))

namespace {

using edgeflex::Engine;
using edgeflex::kDeviceFault;
using edgeflex::kInputFault;
using edgeflex::kMissing;
using edgeflex::kOk;

thread_local std::string last_error;

template <typename Work>
int guard(const Work& work) {
  try {
    return work();
  } catch (const edgeflex::Failure& failure) {
    last_error = failure.what();
    return failure.status;
  } catch (const std::bad_alloc&) {
    last_error = "no memory left";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return kDeviceFault;
}

template <typename Work>
int with(void* engine, const Work& work) {
  return guard([&] {
    if (engine == nullptr) edgeflex::refuse("the engine is closed");
    return work(*static_cast<Engine*>(engine));
  });
}

}  // namespace

extern "C" {

EFX int efx_abi() { return 5; }

#define EFX_TEXT_OF(name) #name
#define EFX_TEXT(name) EFX_TEXT_OF(name)
#if !defined(EFX_SOURCES)
#define EFX_SOURCES unknown
#endif
// The digest of the sources that this was built from.
EFX const char* efx_sources() { return EFX_TEXT(EFX_SOURCES); }

// The processor features that this build needs, as /proc/cpuinfo names them.
EFX const char* efx_features() {
  return ""
#if defined(__AVX2__)
         "avx2 fma "
#endif
#if defined(__AVX512F__)
         "avx512f "
#endif
#if defined(__AVX512BW__)
         "avx512bw "
#endif
#if defined(__AVX512VL__)
         "avx512vl "
#endif
#if defined(__AVX512VNNI__)
         "avx512_vnni "
#endif
#if defined(__ARM_FEATURE_DOTPROD)
         "asimddp "
#endif
#if defined(__ARM_FEATURE_SVE)
         "sve "
#endif
      ;
}

EFX const char* efx_error() { return last_error.c_str(); }

EFX int efx_open(const char* backend, const char* threadpool) {
  return guard([&] {
    edgeflex::open_library(backend, threadpool);
    return kOk;
  });
}

EFX int efx_kernel_id(char* out, size_t size) {
  return guard([&] {
    const std::string& id = edgeflex::library().kernel_id;
    if (id.size() + 1 > size) edgeflex::refuse("the buffer for the kernel id is too small");
    std::memcpy(out, id.c_str(), id.size() + 1);
    return kOk;
  });
}

EFX int efx_packed_bytes(int precision, size_t rows, size_t columns, size_t* bytes) {
  return guard([&] {
    *bytes = edgeflex::packed_bytes(edgeflex::library(), precision, rows, columns);
    return kOk;
  });
}

EFX int efx_pack(int precision, size_t rows, size_t columns, const void* codes, const void* scales, void* out) {
  return guard([&] {
    edgeflex::pack(edgeflex::library(), precision, rows, columns, codes, scales, out);
    return kOk;
  });
}

EFX int efx_time_matrix(int precision, size_t rows, size_t columns, size_t rows_in, size_t threads, size_t total_bytes,
                        double* seconds) {
  return guard([&] {
    if (rows_in == 0 || threads == 0) edgeflex::refuse("a matrix is timed with at least one input row and one thread");
    *seconds = edgeflex::time_matrix(precision, rows, columns, rows_in, threads, total_bytes);
    return kOk;
  });
}

EFX int efx_raw_create(size_t threads, void** experts) {
  return guard([&] {
    *experts = new edgeflex::RawExperts(threads);
    return kOk;
  });
}

EFX void efx_raw_destroy(void* experts) { delete static_cast<edgeflex::RawExperts*>(experts); }

EFX int efx_raw_expert(void* experts, int precision, size_t hidden, size_t width, size_t slices, size_t pitch,
                       const uint8_t* gate_up, const uint8_t* gate_up_scales, const uint8_t* down,
                       const uint8_t* down_scales, const float* rows, size_t count, float* out) {
  return guard([&] {
    if (experts == nullptr) edgeflex::refuse("the experts' kernels are closed");
    // a row's scale in int8 is that of all slices of down
    const size_t shared = precision == edgeflex::kInt8 ? 0 : pitch;
    static_cast<edgeflex::RawExperts*>(experts)->run(
        {precision, 2 * width, hidden, gate_up, gate_up_scales, slices, pitch, pitch, false},
        {precision, hidden, width, down, down_scales, slices, pitch, shared, true}, rows, count, out);
    return kOk;
  });
}

EFX int efx_create(const edgeflex::DecoderSpec* spec, void** engine) {
  return guard([&] {
    *engine = new Engine(*spec);
    return kOk;
  });
}

EFX void efx_destroy(void* engine) { delete static_cast<Engine*>(engine); }

EFX int efx_set_small(void* engine, int layer, int which, const float* values, size_t count) {
  return with(engine, [&](Engine& e) { return e.set_small(layer, which, values, count), kOk; });
}

EFX int efx_set_matrix(void* engine, int layer, int which, int precision, size_t rows, size_t columns,
                       const uint8_t* packed, size_t bytes) {
  return with(engine,
              [&](Engine& e) { return e.set_big(layer, which, precision, rows, columns, packed, bytes), kOk; });
}

EFX int efx_set_embedding(void* engine, int precision, const void* codes, const void* scales) {
  return with(engine, [&](Engine& e) { return e.set_embedding(precision, codes, scales), kOk; });
}

EFX int efx_set_arena(void* engine, uint8_t* start, size_t bytes) {
  return with(engine, [&](Engine& e) { return e.set_arena(start, bytes), kOk; });
}

EFX int efx_expert_bytes(void* engine, int layer, int precision, size_t* bytes, size_t* down_offset) {
  return with(engine, [&](Engine& e) { return *bytes = e.expert_bytes(layer, precision, down_offset), kOk; });
}

EFX int efx_bind(void* engine, int layer, int expert, int precision, size_t offset) {
  return with(engine, [&](Engine& e) { return e.bind(layer, expert, precision, offset), kOk; });
}

EFX int efx_unbind(void* engine, int layer, int expert) {
  return with(engine, [&](Engine& e) { return e.unbind(layer, expert), kOk; });
}

EFX int efx_forward(void* engine, const int32_t* tokens, size_t count, size_t position, int every_logit) {
  return with(engine, [&](Engine& e) { return e.forward(tokens, count, position, every_logit != 0) ? kOk : kMissing; });
}

EFX int efx_compute(void* engine, const int32_t* experts, size_t count) {
  return with(engine, [&](Engine& e) { return e.compute(experts, count), kOk; });
}

EFX int efx_resume(void* engine) {
  return with(engine, [&](Engine& e) { return e.resume() ? kOk : kMissing; });
}

// The event that waits: its layer, its experts, and for each whether it still must be bound. The arrays hold as many
// values as the decoder's largest layer has experts.
EFX int efx_event(void* engine, int32_t* layer, int32_t* experts, uint8_t* missing, size_t* count) {
  return with(engine, [&](Engine& e) {
    if (!e.waiting()) edgeflex::refuse("no event is waiting");
    const edgeflex::Event& event = e.event();
    *layer = event.layer;
    *count = event.experts.size();
    for (size_t i = 0; i < *count; ++i) {
      experts[i] = event.experts[i];
      missing[i] = !event.done[i] && !e.is_bound(event.layer, event.experts[i]);
    }
    return kOk;
  });
}

EFX int efx_log_size(void* engine, size_t* count) {
  return with(engine, [&](Engine& e) { return *count = e.log.size(), kOk; });
}

EFX int efx_take_log(void* engine, int32_t* out, size_t count) {
  return with(engine, [&](Engine& e) {
    if (count != e.log.size()) edgeflex::refuse("the buffer does not fit the log");
    std::copy(e.log.begin(), e.log.end(), out);
    e.log.clear();
    return kOk;
  });
}

EFX int efx_logits(void* engine, const float** values, size_t* rows) {
  return with(engine, [&](Engine& e) { return *values = e.logits(rows), kOk; });
}

EFX int efx_every_logit(void* engine) {
  return engine != nullptr && static_cast<Engine*>(engine)->every_logit();
}

EFX int efx_guess(void* engine, int layer, int32_t* experts, size_t* count) {
  return with(engine, [&](Engine& e) {
    const std::vector<int32_t> guessed = e.guess(layer);
    std::copy(guessed.begin(), guessed.end(), experts);
    *count = guessed.size();
    return kOk;
  });
}

EFX int efx_take_times(void* engine, double* seconds) {
  return with(engine, [&](Engine& e) {
    seconds[0] = e.times.dense;
    seconds[1] = e.times.expert;
    seconds[2] = e.times.other;
    e.times = {};
    return kOk;
  });
}

EFX int efx_memory_bytes(void* engine, size_t* bytes) {
  return with(engine, [&](Engine& e) { return *bytes = e.memory_bytes(), kOk; });
}

}  // extern "C"
