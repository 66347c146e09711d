// What weights a decoder has, their shapes, and where they lie.

#include <algorithm>
#include <cstring>

#include "decoder.h"

namespace edgeflex {
namespace {

using Shape = std::pair<size_t, size_t>;

const char* const kSmallNames[] = {"input_norm", "post_norm", "q_norm", "k_norm", "kv_norm",
                                   "qkv_bias",   "router",    "shared_gate", "norm"};
const char* const kBigNames[] = {"qkv",         "o",        "q",          "kv_a",           "kv_b",
                                 "mlp.gate_up", "mlp.down", "shared.gate_up", "shared.down", "head"};

}  // namespace

Operator* Engine::kernel(int precision, size_t rows, size_t columns) {
  for (const auto& made : kernels_) {
    if (made->precision == precision && made->rows == rows && made->columns == columns) return made.get();
  }
  kernels_.push_back(std::make_unique<Operator>(lib_, precision, rows, columns));
  return kernels_.back().get();
}

// How many values a small tensor has in this decoder; 0: it has no such tensor.
size_t Engine::small_count(int layer, int which) const {
  if (layer < 0) return which == kFinalNorm ? spec_.hidden : 0;
  const LayerSpec& spec = layers_[layer].spec;
  const bool grouped = !spec_.latent;
  switch (which) {
    case kInputNorm:
    case kPostNorm: return spec_.hidden;
    case kQueryNorm:
      return !grouped || spec_.query_key_norm == 0 ? 0 : spec_.query_key_norm == 1 ? query_dim_ : spec_.head_dim;
    case kKeyNorm:
      return !grouped || spec_.query_key_norm == 0 ? 0 : spec_.query_key_norm == 1 ? key_dim_ : spec_.head_dim;
    case kLatentNorm: return grouped ? 0 : spec_.latent_dim;
    case kQkvBias: return grouped && spec_.bias ? projected_ : 0;
    case kRouter: return static_cast<size_t>(std::max(spec.experts, 0)) * spec_.hidden;
    case kSharedGate: return spec.experts > 0 && spec.shared_dim > 0 && spec.shared_gate ? spec_.hidden : 0;
    default: return 0;
  }
}

// [rows, columns] of a matrix in this decoder; zeros: it has no such matrix.
Shape Engine::big_shape(int layer, int which) const {
  const size_t hidden = spec_.hidden, heads = spec_.heads;
  if (layer < 0) return which == kHead ? Shape(spec_.vocabulary, hidden) : Shape();
  const LayerSpec& spec = layers_[layer].spec;
  const size_t dense = spec.experts > 0 ? 0 : spec.dense_dim, shared = spec.experts > 0 ? spec.shared_dim : 0;
  const bool latent = spec_.latent;
  switch (which) {
    case kQkv: return latent ? Shape() : Shape(projected_, hidden);
    case kOut: return {hidden, heads * spec_.value_dim};
    case kQuery: return latent ? Shape(query_dim_, hidden) : Shape();
    case kLatentDown:
      return latent ? Shape(spec_.latent_dim + spec_.rotary_dim, hidden) : Shape();
    case kLatentUp:
      return latent ? Shape(heads * (plain_dim_ + spec_.value_dim), spec_.latent_dim)
                    : Shape();
    case kDenseGateUp: return dense ? Shape(2 * dense, hidden) : Shape();
    case kDenseDown: return dense ? Shape(hidden, dense) : Shape();
    case kSharedGateUp: return shared ? Shape(2 * shared, hidden) : Shape();
    case kSharedDown: return shared ? Shape(hidden, shared) : Shape();
    default: return {};
  }
}

// All small tensors lie together, so that routers come in huge pages.
void Engine::place_smalls() {
  size_t total = 0;
  for (int layer = -1; layer < spec_.layers; ++layer) {
    for (int which = 0; which < kSmalls; ++which) {
      small_places_.push_back(total);
      total += (small_count(layer, which) + 15) / 16 * 16;
    }
  }
  smalls_ = Buffer(total * sizeof(float));
  smalls_.prefer_huge_pages();
}

void Engine::set_small(int layer, int which, const float* from, size_t count) {
  if (layer < -1 || layer >= spec_.layers || which < 0 || which >= kSmalls) refuse("no such tensor in this decoder");
  const size_t wanted = small_count(layer, which);
  if (count != wanted || count == 0) {
    refuse(std::string(kSmallNames[which]) + " has " + std::to_string(count) + " values; this decoder needs " +
           std::to_string(wanted));
  }
  float* to = smalls_.as<float>() + small_places_[(layer + 1) * kSmalls + which];
  std::memcpy(to, from, count * sizeof(float));
  (layer < 0 ? head_ : layers_[layer]).small[which] = to;
}

void Engine::set_big(int layer, int which, int precision, size_t rows, size_t columns, const uint8_t* packed,
                     size_t bytes) {
  if (layer < -1 || layer >= spec_.layers || which < 0 || which >= kBigs) refuse("no such matrix in this decoder");
  const auto shape = big_shape(layer, which);
  if (rows != shape.first || columns != shape.second || rows == 0) {
    refuse(std::string(kBigNames[which]) + " is " + std::to_string(rows) + " x " + std::to_string(columns) +
           "; this decoder needs " + std::to_string(shape.first) + " x " + std::to_string(shape.second));
  }
  if (precision < 0 || precision >= kPrecisions) refuse("precision " + std::to_string(precision) + " is unknown");
  Operator* made = kernel(precision, rows, columns);
  if (bytes < made->packed_bytes) {
    refuse(std::string(kBigNames[which]) + " has " + std::to_string(bytes) + " packed bytes; " +
           std::to_string(made->packed_bytes) + " are needed: pack it again");
  }
  if (reinterpret_cast<uintptr_t>(packed) % 64 != 0) refuse("packed weights must start at a multiple of 64 bytes");
  (layer < 0 ? head_ : layers_[layer]).big[which] = {made, packed};
}

void Engine::set_embedding(int precision, const void* codes, const void* scales) {
  if (precision < 0 || precision >= kPrecisions || codes == nullptr || (precision != kFloat && scales == nullptr)) {
    refuse("an embedding needs a known precision, codes, and scales unless it is fp32");
  }
  if (precision == kInt4 && spec_.hidden % kGroup != 0) refuse("an int4 embedding needs a width in groups of 32");
  embedding_precision_ = precision;
  embedding_codes_ = codes;
  embedding_scales_ = scales;
}

void Engine::set_arena(uint8_t* start, size_t bytes) {
  for (Layer& layer : layers_) layer.experts.assign(layer.experts.size(), Expert());
  arena_ = start;
  arena_bytes_ = bytes;
}

size_t Engine::expert_bytes(int layer, int precision, size_t* down_offset) const {
  if (layer < 0 || layer >= spec_.layers || layers_[layer].experts.empty()) {
    refuse("layer " + std::to_string(layer) + " has no experts");
  }
  const size_t inner = layers_[layer].spec.expert_dim, hidden = spec_.hidden;
  *down_offset = (packed_bytes(lib_, precision, 2 * inner, hidden) + 63) / 64 * 64;
  return *down_offset + packed_bytes(lib_, precision, hidden, inner);
}

void Engine::bind(int layer, int expert, int precision, size_t offset) {
  if (layer < 0 || layer >= spec_.layers || expert < 0 || expert >= layers_[layer].spec.experts) {
    refuse("no expert " + std::to_string(expert) + " in layer " + std::to_string(layer));
  }
  if (precision < 0 || precision >= kPrecisions) refuse("precision " + std::to_string(precision) + " is unknown");
  const size_t inner = layers_[layer].spec.expert_dim, hidden = spec_.hidden;
  Operator* gate_up = kernel(precision, 2 * inner, hidden);
  Operator* down = kernel(precision, hidden, inner);
  const size_t down_offset = (gate_up->packed_bytes + 63) / 64 * 64;
  const size_t bytes = down_offset + down->packed_bytes;
  if (offset % 64 != 0 || bytes > arena_bytes_ || offset > arena_bytes_ - bytes) {
    refuse("an expert of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
           " does not lie in the arena of " + std::to_string(arena_bytes_) + " bytes at a multiple of 64");
  }
  layers_[layer].experts[expert] = {{gate_up, arena_ + offset}, {down, arena_ + offset + down_offset}};
}

void Engine::unbind(int layer, int expert) {
  if (layer < 0 || layer >= spec_.layers || expert < 0 || expert >= layers_[layer].spec.experts) {
    refuse("no expert " + std::to_string(expert) + " in layer " + std::to_string(layer));
  }
  layers_[layer].experts[expert] = Expert();
}

std::vector<std::string> Engine::absent() const {
  std::vector<std::string> names;
  for (int i = -1; i < spec_.layers; ++i) {
    const Layer& layer = i < 0 ? head_ : layers_[i];
    const std::string prefix = i < 0 ? "" : "layers." + std::to_string(i) + ".";
    for (int which = 0; which < kSmalls; ++which) {
      if (small_count(i, which) != 0 && layer.small[which] == nullptr) names.push_back(prefix + kSmallNames[which]);
    }
    for (int which = 0; which < kBigs; ++which) {
      if (big_shape(i, which).first == 0 || layer.big[which].packed != nullptr) continue;
      names.push_back(prefix + kBigNames[which]);
    }
  }
  if (embedding_precision_ < 0) names.push_back("embedding");
  return names;
}

void Engine::require_complete() const {
  const std::vector<std::string> names = absent();
  if (names.empty()) return;
  std::string text = "weights are not set yet: " + names[0];
  for (size_t i = 1; i < names.size() && i < 8; ++i) text += ", " + names[i];
  refuse(text + (names.size() > 8 ? " and " + std::to_string(names.size() - 8) + " more" : ""));
}

}  // namespace edgeflex
