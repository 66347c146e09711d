#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace edgeflex {
namespace {

constexpr size_t kRouterRows = 16;  // router rows that one task takes

void check_spec(const DecoderSpec& s) {
  const auto positive = [](int value, const char* name) {
    if (value < 1) refuse(std::string(name) + " is " + std::to_string(value) + "; it is at least 1");
  };
  positive(s.layers, "layers"), positive(s.hidden, "hidden_dim"), positive(s.vocabulary, "vocabulary");
  positive(s.heads, "heads"), positive(s.kv_heads, "kv_heads"), positive(s.head_dim, "head_dim");
  positive(s.value_dim, "value_dim"), positive(s.context_tokens, "context_tokens");
  positive(s.chunk_tokens, "chunk_tokens"), positive(s.threads, "threads");
  if (s.heads % s.kv_heads != 0) refuse("heads is not a multiple of kv_heads");
  if (s.rotary_dim < 0 || s.rotary_dim % 2 != 0 || s.rotary_dim > s.head_dim) {
    refuse("rotary_dim is " + std::to_string(s.rotary_dim) + "; it is even and at most head_dim");
  }
  if (s.latent && (s.latent_dim < 1 || s.kv_heads != s.heads)) {
    refuse("latent attention needs latent_dim and as many kv_heads as heads");
  }
  if (s.layer_specs == nullptr || (s.rotary_dim > 0 && s.inverse_frequencies == nullptr)) refuse("a null table");
  for (int i = 0; i < s.layers; ++i) {
    const LayerSpec& layer = s.layer_specs[i];
    const std::string name = "layers." + std::to_string(i);
    if (layer.experts > 0 && (layer.top_k < 1 || layer.top_k > layer.experts || layer.expert_dim < 1)) {
      refuse(name + ": top_k is between 1 and the number of experts, and expert_dim at least 1");
    }
    if (layer.experts <= 0 && layer.dense_dim < 1) refuse(name + ": a dense layer needs dense_dim");
    if (layer.experts < 0 || layer.expert_dim < 0 || layer.dense_dim < 0 || layer.shared_dim < 0) {
      refuse(name + ": a number of experts or a dimension is negative");
    }
  }
}

}  // namespace

Engine::Engine(const DecoderSpec& spec) : lib_(library()), spec_(spec) {
  check_spec(spec);
  frequencies_.assign(spec.inverse_frequencies, spec.inverse_frequencies + spec.rotary_dim / 2);
  for (int i = 0; i < spec.layers; ++i) {
    Layer layer;
    layer.spec = spec.layer_specs[i];
    layer.experts.resize(std::max(layer.spec.experts, 0));
    inner_ = std::max<size_t>({inner_, static_cast<size_t>(layer.spec.expert_dim),
                               static_cast<size_t>(layer.spec.dense_dim), static_cast<size_t>(layer.spec.shared_dim)});
    top_k_ = std::max<size_t>(top_k_, layer.spec.experts > 0 ? layer.spec.top_k : 1);
    most_experts_ = std::max<size_t>(most_experts_, layer.experts.size());
    layers_.push_back(std::move(layer));
  }
  spec_.inverse_frequencies = nullptr;
  spec_.layer_specs = nullptr;
  query_dim_ = static_cast<size_t>(spec.heads) * spec.head_dim;
  key_dim_ = static_cast<size_t>(spec.kv_heads) * spec.head_dim;
  plain_dim_ = spec.latent ? spec.head_dim - spec.rotary_dim : 0;
  projected_ = spec.latent ? query_dim_ : query_dim_ + key_dim_ + static_cast<size_t>(spec.kv_heads) * spec.value_dim;
  place_smalls();
  allocate();
  if (spec.threads > 1) {
    pool_ = lib_.create_pool(spec.threads);
    if (pool_ == nullptr) fail("no pool of " + std::to_string(spec.threads) + " threads could be made");
  }
}

Engine::~Engine() {
  kernels_.clear();
  if (pool_ != nullptr) lib_.destroy_pool(pool_);
}

void Engine::allocate() {
  const size_t chunk = spec_.chunk_tokens, most = std::max<size_t>(chunk, top_k_);
  const size_t hidden = spec_.hidden, heads = spec_.heads, width = sizeof(float);
  const size_t attended = heads * spec_.value_dim;
  padded_ = (spec_.value_dim + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  positions_ = (spec_.context_tokens + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const size_t kept = spec_.half_cache ? width / 2 : width;
  const size_t cached = static_cast<size_t>(spec_.layers) * spec_.kv_heads * positions_ * kept;
  key_cache_ = Buffer(cached * spec_.head_dim);
  value_cache_ = Buffer(cached * padded_);
  key_cache_.prefer_huge_pages();
  value_cache_.prefer_huge_pages();
  const size_t half = spec_.rotary_dim / 2;
  cosines_ = Buffer(spec_.context_tokens * half * width);
  sines_ = Buffer(spec_.context_tokens * half * width);
  for (size_t position = 0; position < static_cast<size_t>(spec_.context_tokens); ++position) {
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<float>(position) * frequencies_[i];  // the product in fp32, as trained
      cosines_.as<float>()[position * half + i] = static_cast<float>(std::cos(angle)) * spec_.rotary_scale;
      sines_.as<float>()[position * half + i] = static_cast<float>(std::sin(angle)) * spec_.rotary_scale;
    }
  }
  x_ = Buffer(chunk * hidden * width);
  normed_ = Buffer(chunk * hidden * width + kExtraBytes);
  projection_ = Buffer(chunk * projected_ * width);
  if (spec_.latent) {
    latent_ = Buffer(chunk * (spec_.latent_dim + spec_.rotary_dim) * width);
    latent_normed_ = Buffer(chunk * spec_.latent_dim * width + kExtraBytes);
    expanded_ = Buffer(chunk * heads * (plain_dim_ + spec_.value_dim) * width);
    key_row_ = Buffer(chunk * spec_.head_dim * width);
  }
  attended_ = Buffer(chunk * attended * width + kExtraBytes);
  gate_up_ = Buffer(most * 2 * inner_ * width);
  inner_rows_ = Buffer(most * inner_ * width + kExtraBytes);
  outputs_ = Buffer(chunk * top_k_ * hidden * width);
  shared_ = Buffer(chunk * hidden * width);
  router_ = Buffer(chunk * std::max<size_t>(most_experts_, 1) * width);
  score_rows_ = std::min<size_t>(kQueryRows, chunk * (spec_.heads / spec_.kv_heads));
  scratch_ = Buffer(spec_.threads * (score_rows_ * positions_ + 4 * padded_) * width);
  logits_ = Buffer(spec_.vocabulary * width);
  const size_t latent = spec_.latent ? spec_.latent_dim : 0;
  hidden_input_ = Input(lib_, chunk, hidden);
  other_input_ = Input(lib_, most, std::max({attended, inner_, latent, hidden}));
  gathered_input_ = Input(lib_, chunk, hidden);
}

size_t Engine::memory_bytes() const {
  size_t total = hidden_input_.bytes() + other_input_.bytes() + gathered_input_.bytes();
  for (const Buffer* buffer :
       {&smalls_, &cosines_, &sines_, &key_cache_, &value_cache_, &x_, &normed_, &projection_, &latent_,
        &latent_normed_, &expanded_, &key_row_, &attended_, &gate_up_, &inner_rows_, &outputs_, &shared_, &router_,
        &logits_, &scratch_,
        &workspace_}) {
    total += buffer->bytes();
  }
  for (const Layer& layer : layers_) {
    total += layer.experts.size() * sizeof(Expert);
  }
  return total;
}

// --- the forward pass ---------------------------------------------------------------------------------------

bool Engine::forward(const int32_t* tokens, size_t count, size_t position, bool every_logit) {
  require_complete();
  if (count == 0 || count > static_cast<size_t>(spec_.chunk_tokens)) {
    refuse("a chunk of " + std::to_string(count) + " tokens; give between 1 and " + std::to_string(spec_.chunk_tokens));
  }
  if (position > filled_) {
    refuse("position " + std::to_string(position) + " leaves a gap: the cache holds " + std::to_string(filled_) +
           " tokens");
  }
  if (position + count > static_cast<size_t>(spec_.context_tokens)) {
    refuse("tokens up to position " + std::to_string(position + count) + " do not fit the context of " +
           std::to_string(spec_.context_tokens) + "; make the bundle with a longer one, or shorten the text");
  }
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= spec_.vocabulary) {
      refuse("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
             std::to_string(spec_.vocabulary));
    }
  }
  tokens_ = count;
  position_ = position;
  filled_ = position;  // until the pass is through, its keys do not count
  every_logit_ = every_logit;
  finished_ = waiting_ = logits_ready_ = false;
  layer_ = 0;
  {
    const Stopwatch watch(&times.other);
    embed(tokens);
  }
  return run_layers();
}

bool Engine::resume() {
  if (!waiting_) refuse("there is nothing to resume: no forward pass is waiting for experts");
  if (!run_bound()) return false;
  waiting_ = false;
  combine();
  ++layer_;
  return run_layers();
}

void Engine::compute(const int32_t* experts, size_t count) {
  if (!waiting_) refuse("there is nothing to compute: no forward pass is waiting for experts");
  std::vector<size_t> places;
  for (size_t i = 0; i < count; ++i) {
    const auto found = std::lower_bound(event_.experts.begin(), event_.experts.end(), experts[i]);
    if (found == event_.experts.end() || *found != experts[i]) {
      refuse("expert " + std::to_string(experts[i]) + " is not in the present event of layer " +
             std::to_string(layer_));
    }
    if (!layers_[layer_].experts[experts[i]].bound()) {
      refuse("expert " + std::to_string(experts[i]) + " of layer " + std::to_string(layer_) + " is not bound");
    }
    places.push_back(found - event_.experts.begin());
  }
  run_shared();
  run_experts(places);
}

bool Engine::run_layers() {
  for (; layer_ < spec_.layers; ++layer_) {
    attention(layer_);
    Layer& layer = layers_[layer_];
    if (layer.experts.empty()) {
      const Stopwatch watch(&times.dense);
      feed_forward(layer.big[kDenseGateUp], layer.big[kDenseDown], hidden_input_, layer.spec.dense_dim,
                   shared_.as<float>());
      add_rows(shared_.as<float>());
      continue;
    }
    route(layer_);
    for (const int32_t expert : event_.experts) waiting_ = waiting_ || !layer.experts[expert].bound();
    if (waiting_) return false;
    run_bound();
    combine();
  }
  filled_ = position_ + tokens_;
  finished_ = true;
  return true;
}

void Engine::multiply(const Matrix& matrix, Input& input, float* out) {
  Operator& kernel = *matrix.kernel;
  if (input.rows > 1 || !kernel.has_gemv()) {
    kernel.run(matrix.packed, input, out, pool_, workspace_);
    return;
  }
  input.quantise(lib_, kernel.form(), pool_);
  const uint8_t* x = input.codes(kernel.form());
  const QuantisedRow row = *input.params(kernel.form());
  if (pool_ == nullptr) {
    kernel.run_rows(matrix.packed, x, row, 0, kernel.rows, out);
    return;
  }
  parallel((kernel.rows + kTaskRows - 1) / kTaskRows, [&](size_t, size_t task) {
    const size_t first = task * kTaskRows;
    kernel.run_rows(matrix.packed, x, row, first, std::min(first + kTaskRows, kernel.rows), out);
  });
}

void Engine::embed(const int32_t* tokens) {
  const size_t hidden = spec_.hidden;
  for (size_t t = 0; t < tokens_; ++t) {
    float* out = x_.as<float>() + t * hidden;
    const size_t row = tokens[t];
    if (embedding_precision_ == kFloat) {
      std::memcpy(out, static_cast<const float*>(embedding_codes_) + row * hidden, hidden * sizeof(float));
    } else if (embedding_precision_ == kInt8) {
      const auto* codes = static_cast<const int8_t*>(embedding_codes_) + row * hidden;
      const float scale = static_cast<const float*>(embedding_scales_)[row];
      for (size_t i = 0; i < hidden; ++i) out[i] = static_cast<float>(codes[i]) * scale;
    } else {
      const auto* codes = static_cast<const uint8_t*>(embedding_codes_) + row * hidden / 2;
      const auto* scales = static_cast<const uint16_t*>(embedding_scales_) + row * (hidden / kGroup);
      for (size_t i = 0; i < hidden; ++i) {
        const int code = (codes[i / 2] >> (i % 2 * 4)) & 15;
        out[i] = static_cast<float>(code - 8) * from_bfloat16(scales[i / kGroup]);
      }
    }
  }
}

void Engine::add_rows(const float* from) {
  float* x = x_.as<float>();
  for (size_t i = 0; i < tokens_ * spec_.hidden; ++i) x[i] += from[i];
}

// --- feed-forward and experts -------------------------------------------------------------------------------

void Engine::feed_forward(const Matrix& gate_up, const Matrix& down, Input& input, size_t inner, float* out) {
  const size_t rows = input.rows;
  float* wide = gate_up_.as<float>();
  float* narrow = inner_rows_.as<float>();
  multiply(gate_up, input, wide);
  parallel(rows, [&](size_t, size_t r) {
    silu_multiply(wide + r * 2 * inner, wide + r * 2 * inner + inner, inner, narrow + r * inner);
  });
  other_input_.set(narrow, rows, inner);
  multiply(down, other_input_, out);
}

void Engine::choose(const Layer& layer, const float* scores, size_t count, int32_t* ids, float* weights) {
  const size_t experts = layer.experts.size(), top_k = layer.spec.top_k;
  std::vector<float> left(experts);
  for (size_t t = 0; t < count; ++t) {
    const float* row = scores + t * experts;
    left.assign(row, row + experts);
    const float highest = *std::max_element(row, row + experts);
    double total = 0.0, chosen = 0.0;
    for (size_t e = 0; e < experts; ++e) total += std::exp(static_cast<double>(row[e]) - highest);
    for (size_t k = 0; k < top_k; ++k) {
      const auto best = std::max_element(left.begin(), left.end());  // the first of equals
      ids[k] = static_cast<int32_t>(best - left.begin());
      weights[k] = static_cast<float>(std::exp(static_cast<double>(*best) - highest) / total);
      chosen += weights[k];
      *best = -INFINITY;
    }
    const float factor = layer.spec.scale * (layer.spec.normalised ? static_cast<float>(1.0 / chosen) : 1.0f);
    for (size_t k = 0; k < top_k; ++k) weights[k] *= factor;
    ids += top_k;
    weights += top_k;
  }
}

void Engine::route(int index) {
  const Stopwatch watch(&times.other);
  const Layer& layer = layers_[index];
  const size_t experts = layer.experts.size(), hidden = spec_.hidden, top_k = layer.spec.top_k;
  const size_t blocks = (experts + kRouterRows - 1) / kRouterRows;
  const float* router = layer.small[kRouter];
  float* scores = router_.as<float>();
  parallel(tokens_ * blocks, [&](size_t, size_t task) {
    const size_t t = task / blocks, first = task % blocks * kRouterRows;
    for (size_t e = first; e < std::min(first + kRouterRows, experts); ++e) {
      scores[t * experts + e] = dot(router + e * hidden, normed_.as<float>() + t * hidden, hidden);
    }
  });
  for (size_t i = 0; i < tokens_ * experts; ++i) {
    if (!std::isfinite(scores[i])) {
      fail("layer " + std::to_string(index) + ": a router score is not finite; the weights are damaged");
    }
  }
  event_.layer = index;
  event_.ids.resize(tokens_ * top_k);
  event_.weights.resize(tokens_ * top_k);
  choose(layer, scores, tokens_, event_.ids.data(), event_.weights.data());
  group_rows();
  write_log();
}

void Engine::group_rows() {
  const size_t experts = layers_[event_.layer].experts.size(), choices = event_.ids.size();
  const size_t top_k = choices / tokens_;
  std::vector<int32_t> next(experts, 0);
  for (const int32_t id : event_.ids) ++next[id];
  event_.experts.clear();
  event_.starts.clear();
  int32_t start = 0;
  for (size_t e = 0; e < experts; ++e) {
    if (next[e] == 0) continue;
    event_.experts.push_back(static_cast<int32_t>(e));
    event_.starts.push_back(start);
    const int32_t count = next[e];
    next[e] = start;
    start += count;
  }
  event_.starts.push_back(start);
  event_.rows.resize(choices);
  event_.places.resize(choices);
  for (size_t i = 0; i < choices; ++i) {
    const int32_t place = next[event_.ids[i]]++;
    event_.rows[place] = static_cast<int32_t>(i / top_k);
    event_.places[i] = place;
  }
  event_.done.assign(event_.experts.size(), 0);
  event_.shared_done = false;
}

void Engine::write_log() {
  const size_t top_k = event_.ids.size() / tokens_;
  for (const size_t value : {static_cast<size_t>(event_.layer), tokens_, top_k, event_.experts.size()}) {
    log.push_back(static_cast<int32_t>(value));
  }
  log.insert(log.end(), event_.experts.begin(), event_.experts.end());
  log.insert(log.end(), event_.ids.begin(), event_.ids.end());
  const size_t at = log.size();
  log.resize(at + event_.weights.size());
  std::memcpy(log.data() + at, event_.weights.data(), event_.weights.size() * sizeof(float));
}

void Engine::run_expert(size_t index) {
  if (event_.done[index]) return;
  const Stopwatch watch(&times.expert);
  const Layer& layer = layers_[event_.layer];
  const Expert& expert = layer.experts[event_.experts[index]];
  const size_t start = event_.starts[index], rows = event_.starts[index + 1] - start;
  const int form = lib_.activation[expert.gate_up.kernel->precision];
  Input* input = &hidden_input_;
  if (tokens_ > 1) {
    hidden_input_.quantise(lib_, form, pool_);
    gathered_input_.gather(hidden_input_, form, event_.rows.data() + start, rows);
    input = &gathered_input_;
  }
  feed_forward(expert.gate_up, expert.down, *input, layer.spec.expert_dim,
               outputs_.as<float>() + start * spec_.hidden);
  event_.done[index] = 1;
}

void Engine::run_experts(const std::vector<size_t>& indices) {
  if (tokens_ > 1) {
    for (const size_t index : indices) run_expert(index);
    return;
  }
  // One token: experts with a kernel for one row go together, so that threads meet twice and not twice an expert.
  std::array<std::vector<size_t>, kPrecisions> together;
  for (const size_t index : indices) {
    const Operator* kernel = layers_[event_.layer].experts[event_.experts[index]].gate_up.kernel;
    if (!kernel->has_gemv()) {
      run_expert(index);
    } else if (!event_.done[index]) {
      together[kernel->precision].push_back(index);
      event_.done[index] = 1;
    }
  }
  for (const std::vector<size_t>& group : together) {
    if (!group.empty()) run_single(group);
  }
}

void Engine::run_single(const std::vector<size_t>& indices) {
  const Stopwatch watch(&times.expert);
  const Layer& layer = layers_[event_.layer];
  const size_t hidden = spec_.hidden, inner = layer.spec.expert_dim, wide = 2 * inner;
  const auto expert = [&](size_t i) -> const Expert& { return layer.experts[event_.experts[indices[i]]]; };
  const int form = expert(0).gate_up.kernel->form();
  float* gate_up = gate_up_.as<float>();
  float* narrow = inner_rows_.as<float>();
  hidden_input_.quantise(lib_, form, pool_);
  const auto each = [&](size_t rows, const auto& task) {
    const size_t step = pool_ == nullptr ? rows : kTaskRows, parts = (rows + step - 1) / step;
    parallel(indices.size() * parts, [&](size_t, size_t i) {
      task(i / parts, i % parts * step, std::min((i % parts + 1) * step, rows));
    });
  };
  each(wide, [&](size_t i, size_t first, size_t last) {
    const Matrix& matrix = expert(i).gate_up;
    matrix.kernel->run_rows(matrix.packed, hidden_input_.codes(form), *hidden_input_.params(form), first, last,
                            gate_up + i * wide);
  });
  parallel(indices.size(), [&](size_t, size_t i) {
    silu_multiply(gate_up + i * wide, gate_up + i * wide + inner, inner, narrow + i * inner);
  });
  other_input_.set(narrow, indices.size(), inner);
  other_input_.quantise(lib_, form, pool_);
  each(hidden, [&](size_t i, size_t first, size_t last) {
    const Matrix& matrix = expert(i).down;
    matrix.kernel->run_rows(matrix.packed, other_input_.codes(form) + i * inner, other_input_.params(form)[i], first,
                            last, outputs_.as<float>() + event_.starts[indices[i]] * hidden);
  });
}

void Engine::run_shared() {
  Layer& layer = layers_[event_.layer];
  if (event_.shared_done || layer.spec.shared_dim == 0) return;
  const Stopwatch watch(&times.dense);
  const size_t hidden = spec_.hidden;
  feed_forward(layer.big[kSharedGateUp], layer.big[kSharedDown], hidden_input_, layer.spec.shared_dim,
               shared_.as<float>());
  if (layer.spec.shared_gate) {
    parallel(tokens_, [&](size_t, size_t t) {
      const float score = dot(layer.small[kSharedGate], normed_.as<float>() + t * hidden, hidden);
      const float gate = 1.0f / (1.0f + std::exp(-score));
      float* row = shared_.as<float>() + t * hidden;
      for (size_t i = 0; i < hidden; ++i) row[i] *= gate;
    });
  }
  event_.shared_done = true;
}

bool Engine::run_bound() {
  run_shared();
  bool complete = true;
  std::vector<size_t> bound;
  for (size_t i = 0; i < event_.experts.size(); ++i) {
    if (event_.done[i]) continue;
    const bool here = layers_[event_.layer].experts[event_.experts[i]].bound();
    if (here) bound.push_back(i);
    complete = complete && here;
  }
  run_experts(bound);
  return complete;
}

// Sums each token's experts in the order of its choices, then the shared experts: an order that neither residency
// nor the order of loading changes.
void Engine::combine() {
  const Stopwatch watch(&times.other);
  const size_t hidden = spec_.hidden, top_k = event_.ids.size() / tokens_;
  const bool shared = layers_[event_.layer].spec.shared_dim > 0;
  parallel(tokens_, [&](size_t, size_t t) {
    float* sum = normed_.as<float>() + t * hidden;  // the norm's rows have done their work
    for (size_t k = 0; k < top_k; ++k) {
      const float* from = outputs_.as<float>() + event_.places[t * top_k + k] * hidden;
      const float weight = event_.weights[t * top_k + k];
      for (size_t i = 0; i < hidden; ++i) sum[i] = k == 0 ? weight * from[i] : sum[i] + weight * from[i];
    }
    float* x = x_.as<float>() + t * hidden;
    const float* extra = shared_.as<float>() + t * hidden;
    for (size_t i = 0; i < hidden; ++i) x[i] += shared ? sum[i] + extra[i] : sum[i];
  });
}

// --- results ------------------------------------------------------------------------------------------------

const float* Engine::logits(size_t* rows) {
  if (!finished_) refuse("there are no logits yet: run a forward pass to its end first");
  *rows = every_logit_ ? tokens_ : 1;
  if (logits_ready_) return logits_.as<float>();
  const size_t hidden = spec_.hidden, first = tokens_ - *rows;
  if (logits_.bytes() < *rows * spec_.vocabulary * sizeof(float)) {
    logits_ = Buffer(*rows * spec_.vocabulary * sizeof(float));
  }
  const Stopwatch watch(&times.dense);
  parallel(*rows, [&](size_t, size_t t) {
    rms_norm(x_.as<float>() + (first + t) * hidden, head_.small[kFinalNorm], hidden, spec_.norm_epsilon,
             normed_.as<float>() + t * hidden);
  });
  hidden_input_.set(normed_.as<float>(), *rows, hidden);
  multiply(head_.big[kHead], hidden_input_, logits_.as<float>());
  logits_ready_ = true;
  return logits_.as<float>();
}

// The experts that `layer` would choose for the rows as they are now: a guess made before the present layer's
// experts are added (speculative loading of Eliseev and Mazur 2023, §3.2).
std::vector<int32_t> Engine::guess(int index) {
  if (index < 0 || index >= spec_.layers || layers_[index].experts.empty()) {
    refuse("layer " + std::to_string(index) + " has no experts to guess");
  }
  if (!waiting_ && !finished_) refuse("there is nothing to guess from: no forward pass is under way");
  const Layer& layer = layers_[index];
  const size_t hidden = spec_.hidden, experts = layer.experts.size(), top_k = layer.spec.top_k;
  std::vector<float> row(hidden), scores(experts), weights(top_k);
  std::vector<int32_t> ids(top_k), all;
  for (size_t t = 0; t < tokens_; ++t) {
    rms_norm(x_.as<float>() + t * hidden, layer.small[kPostNorm], hidden, spec_.norm_epsilon, row.data());
    for (size_t e = 0; e < experts; ++e) scores[e] = dot(layer.small[kRouter] + e * hidden, row.data(), hidden);
    choose(layer, scores.data(), 1, ids.data(), weights.data());
    all.insert(all.end(), ids.begin(), ids.end());
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

}  // namespace edgeflex
