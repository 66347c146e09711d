// Attention of one layer: projections, rotary positions, the key/value cache, softmax, and the way back.

#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "kernels.h"

namespace edgeflex {

template <typename T>
T* Engine::keys(int layer, size_t head) const {
  const size_t each = static_cast<size_t>(spec_.head_dim) * kKeyBlock;
  return key_cache_.as<T>() + static_cast<size_t>(layer) * positions_ * key_dim_ + head * each;
}

template <typename T>
T* Engine::values(int layer, size_t head) const {
  return value_cache_.as<T>() + (static_cast<size_t>(layer) * positions_ * spec_.kv_heads + head * kKeyBlock) * padded_;
}

template <typename T>
void Engine::attend_all(int layer) {
  const size_t group = spec_.heads / spec_.kv_heads, rows = tokens_ * group;
  const size_t blocks = (rows + score_rows_ - 1) / score_rows_;
  const size_t scratch = score_rows_ * positions_ + 4 * padded_;
  parallel(blocks * spec_.kv_heads, [&](size_t thread, size_t task) {
    const size_t head = task % spec_.kv_heads, first = task / spec_.kv_heads * score_rows_;
    const size_t count = std::min(score_rows_, rows - first);
    const float* queries[kQueryRows];
    float* outputs[kQueryRows];
    size_t valid[kQueryRows];
    for (size_t i = 0; i < count; ++i) {
      const size_t token = (first + i) / group, which = head * group + (first + i) % group;
      queries[i] = projection_.as<float>() + token * projected_ + which * spec_.head_dim;
      outputs[i] = attended_.as<float>() + (token * spec_.heads + which) * spec_.value_dim;
      valid[i] = position_ + token + 1;
    }
    const AttentionRows<T> work{queries,
                             outputs,
                             valid,
                             count,
                             keys<T>(layer, head),
                             values<T>(layer, head),
                             kKeyBlock * key_dim_,
                             kKeyBlock * spec_.kv_heads * padded_,
                             static_cast<size_t>(spec_.head_dim),
                             static_cast<size_t>(spec_.value_dim),
                             padded_,
                             spec_.softmax_scale};
    float* scores = scratch_.as<float>() + thread * scratch;
    attend(work, scores, positions_, scores + score_rows_ * positions_);
  });
}

void Engine::attention(int index) {
  Layer& layer = layers_[index];
  const size_t hidden = spec_.hidden;
  float* x = x_.as<float>();
  float* normed = normed_.as<float>();
  const auto norm = [&](const float* weight) {
    parallel(tokens_, [&](size_t, size_t t) {
      rms_norm(x + t * hidden, weight, hidden, spec_.norm_epsilon, normed + t * hidden);
    });
    hidden_input_.set(normed, tokens_, hidden);
  };
  {
    const Stopwatch watch(&times.other);
    norm(layer.small[kInputNorm]);
  }
  {
    const Stopwatch watch(&times.dense);
    multiply(layer.big[spec_.latent ? kQuery : kQkv], hidden_input_, projection_.as<float>());
    if (spec_.latent) {
      const size_t latent = spec_.latent_dim, stride = latent + spec_.rotary_dim;
      multiply(layer.big[kLatentDown], hidden_input_, latent_.as<float>());
      parallel(tokens_, [&](size_t, size_t t) {
        rms_norm(latent_.as<float>() + t * stride, layer.small[kLatentNorm], latent, spec_.norm_epsilon,
                 latent_normed_.as<float>() + t * latent);
      });
      other_input_.set(latent_normed_.as<float>(), tokens_, latent);
      multiply(layer.big[kLatentUp], other_input_, expanded_.as<float>());
    }
  }
  {
    const Stopwatch watch(&times.other);
    parallel(tokens_, [&](size_t, size_t t) { spec_.latent ? latent_rows(layer, t) : grouped_rows(layer, t); });
    spec_.half_cache ? attend_all<Half>(index) : attend_all<float>(index);
  }
  {
    const Stopwatch watch(&times.dense);
    other_input_.set(attended_.as<float>(), tokens_, static_cast<size_t>(spec_.heads) * spec_.value_dim);
    multiply(layer.big[kOut], other_input_, shared_.as<float>());
  }
  const Stopwatch watch(&times.other);
  add_rows(shared_.as<float>());
  norm(layer.small[kPostNorm]);
}

template <typename T>
void Engine::store_as(int layer, size_t token, size_t head, const float* key, const float* value) {
  const size_t position = position_ + token, dims = spec_.head_dim;
  T* slot = keys<T>(layer, head) + position / kKeyBlock * kKeyBlock * key_dim_ + position % kKeyBlock;
  for (size_t d = 0; d < dims; ++d) keep(key[d], slot + d * kKeyBlock);
  const size_t line = position / kKeyBlock * kKeyBlock * spec_.kv_heads + position % kKeyBlock;
  T* row = values<T>(layer, head) + line * padded_;
  for (size_t d = 0; d < static_cast<size_t>(spec_.value_dim); ++d) keep(value[d], row + d);
}

void Engine::store_key_value(int layer, size_t token, size_t head, const float* key, const float* value) {
  spec_.half_cache ? store_as<Half>(layer, token, head, key, value) : store_as<float>(layer, token, head, key, value);
}

void Engine::grouped_rows(const Layer& layer, size_t token) {
  const size_t dims = spec_.head_dim, half = spec_.rotary_dim / 2;
  float* query = projection_.as<float>() + token * projected_;
  float* key = query + query_dim_;
  float* value = key + key_dim_;
  if (spec_.bias) {
    const float* bias = layer.small[kQkvBias];
    for (size_t i = 0; i < projected_; ++i) query[i] += bias[i];
  }
  if (spec_.query_key_norm != 0) {
    const bool whole = spec_.query_key_norm == 1;
    const size_t query_step = whole ? query_dim_ : dims, key_step = whole ? key_dim_ : dims;
    for (size_t i = 0; i < query_dim_; i += query_step) {
      rms_norm(query + i, layer.small[kQueryNorm], query_step, spec_.norm_epsilon, query + i);
    }
    for (size_t i = 0; i < key_dim_; i += key_step) {
      rms_norm(key + i, layer.small[kKeyNorm], key_step, spec_.norm_epsilon, key + i);
    }
  }
  const float* cosine = cosines_.as<float>() + (position_ + token) * half;
  const float* sine = sines_.as<float>() + (position_ + token) * half;
  for (size_t i = 0; i < query_dim_ + key_dim_; i += dims) rotate(query + i, cosine, sine, half);
  for (size_t head = 0; head < static_cast<size_t>(spec_.kv_heads); ++head) {
    store_key_value(layer_, token, head, key + head * dims, value + head * spec_.value_dim);
  }
}

void Engine::latent_rows(const Layer&, size_t token) {
  const size_t dims = spec_.head_dim, half = spec_.rotary_dim / 2, each = plain_dim_ + spec_.value_dim;
  const float* cosine = cosines_.as<float>() + (position_ + token) * half;
  const float* sine = sines_.as<float>() + (position_ + token) * half;
  float* query = projection_.as<float>() + token * projected_;
  float* shared_key = latent_.as<float>() + token * (spec_.latent_dim + spec_.rotary_dim) + spec_.latent_dim;
  float* key = key_row_.as<float>() + token * dims;
  rotate(shared_key, cosine, sine, half);
  std::memcpy(key + plain_dim_, shared_key, spec_.rotary_dim * sizeof(float));
  for (size_t head = 0; head < static_cast<size_t>(spec_.heads); ++head) {
    rotate(query + head * dims + plain_dim_, cosine, sine, half);
    const float* expanded = expanded_.as<float>() + (token * spec_.heads + head) * each;
    std::memcpy(key, expanded, plain_dim_ * sizeof(float));
    store_key_value(layer_, token, head, key, expanded + plain_dim_);
  }
}

}  // namespace edgeflex
