// A decoder with experts that come and go: the forward pass runs until an expert is missing, and can be resumed.

#pragma once

#include <array>
#include <chrono>
#include <memory>
#include <vector>

#include "xnnpack.h"

namespace edgeflex {

// The interface below is mirrored field by field in edgeflex/runtimes/native.py.
struct LayerSpec {
  int32_t experts;  // 0: a dense layer
  int32_t top_k;
  int32_t normalised;
  float scale;
  int32_t expert_dim;
  int32_t dense_dim;
  int32_t shared_dim;
  int32_t shared_gate;
};

struct DecoderSpec {
  int32_t layers;
  int32_t hidden;
  int32_t vocabulary;
  int32_t latent;  // 0 grouped attention, 1 latent
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t value_dim;
  int32_t rotary_dim;
  int32_t latent_dim;
  int32_t query_key_norm;  // 0 none, 1 projection, 2 head
  int32_t bias;
  float rotary_scale;
  float softmax_scale;
  float norm_epsilon;
  int32_t context_tokens;
  int32_t chunk_tokens;
  int32_t threads;
  int32_t half_cache;  // keys and values are kept in fp16 rather than fp32
  const float* inverse_frequencies;
  const LayerSpec* layer_specs;
};

enum Small : int {
  kInputNorm, kPostNorm, kQueryNorm, kKeyNorm, kLatentNorm, kQkvBias, kRouter, kSharedGate, kFinalNorm, kSmalls
};
enum Big : int {
  kQkv, kOut, kQuery, kLatentDown, kLatentUp, kDenseGateUp, kDenseDown, kSharedGateUp, kSharedDown, kHead, kBigs
};

struct Matrix {
  Operator* kernel = nullptr;
  const uint8_t* packed = nullptr;
};

struct Expert {
  Matrix gate_up, down;
  bool bound() const { return gate_up.packed != nullptr; }
};

struct Layer {
  LayerSpec spec;
  std::array<float*, kSmalls> small{};  // null until set
  std::array<Matrix, kBigs> big;
  std::vector<Expert> experts;
};

// Tokens of one forward pass in one layer, and which of them each expert gets.
struct Event {
  int layer = -1;
  std::vector<int32_t> experts;  // ascending
  std::vector<int32_t> starts;   // per expert of `experts`: its first row in `rows`; one more at the end
  std::vector<int32_t> rows;     // tokens, grouped by expert
  std::vector<int32_t> ids;      // [tokens][top_k]
  std::vector<float> weights;    // [tokens][top_k]
  std::vector<int32_t> places;   // [tokens][top_k]: where in `rows` each choice stands
  std::vector<uint8_t> done;     // per expert of `experts`
  bool shared_done = false;
};

struct Times {
  double dense = 0.0, expert = 0.0, other = 0.0;
};

class Stopwatch {
 public:
  explicit Stopwatch(double* into) : into_(into), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { *into_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  double* into_;
  std::chrono::steady_clock::time_point start_;
};

constexpr size_t kTaskRows = 256;  // matrix rows of one task of a product with one input row
constexpr size_t kQueryRows = 16;  // rows of one attention task: their scores stay in the second-level cache

class Engine {
 public:
  explicit Engine(const DecoderSpec& spec);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  void set_small(int layer, int which, const float* values, size_t count);
  void set_big(int layer, int which, int precision, size_t rows, size_t columns, const uint8_t* packed, size_t bytes);
  void set_embedding(int precision, const void* codes, const void* scales);
  void set_arena(uint8_t* start, size_t bytes);
  void bind(int layer, int expert, int precision, size_t offset);
  void unbind(int layer, int expert);

  bool forward(const int32_t* tokens, size_t count, size_t position, bool every_logit);  // false: experts are missing
  void compute(const int32_t* experts, size_t count);
  bool resume();
  const float* logits(size_t* rows);
  const Event& event() const { return event_; }
  bool is_bound(int layer, int expert) const { return layers_[layer].experts[expert].bound(); }
  std::vector<int32_t> guess(int layer);

  size_t expert_bytes(int layer, int precision, size_t* down_offset) const;
  std::vector<int32_t> log;  // what `take_events` drains
  Times times;
  size_t memory_bytes() const;
  const DecoderSpec& spec() const { return spec_; }
  bool waiting() const { return waiting_; }
  bool every_logit() const { return every_logit_; }
  std::vector<std::string> absent() const;

 private:
  template <typename Task>
  void parallel(size_t count, const Task& task);
  Operator* kernel(int precision, size_t rows, size_t columns);
  size_t small_count(int layer, int which) const;
  std::pair<size_t, size_t> big_shape(int layer, int which) const;
  void allocate();
  void place_smalls();
  void multiply(const Matrix& matrix, Input& input, float* out);
  void embed(const int32_t* tokens);
  bool run_layers();
  void attention(int layer);
  void grouped_rows(const Layer& layer, size_t token);
  void latent_rows(const Layer& layer, size_t token);
  template <typename T>
  void store_as(int layer, size_t token, size_t head, const float* key, const float* value);
  void store_key_value(int layer, size_t token, size_t head, const float* key, const float* value);
  template <typename T>
  void attend_all(int layer);
  void feed_forward(const Matrix& gate_up, const Matrix& down, Input& input, size_t inner, float* out);
  void route(int layer);
  void choose(const Layer& layer, const float* scores, size_t token, int32_t* ids, float* weights);
  void group_rows();
  void write_log();
  void run_expert(size_t index);
  void run_experts(const std::vector<size_t>& indices);
  void run_single(const std::vector<size_t>& indices);
  void run_shared();
  bool run_bound();  // false: some experts of the event are neither computed nor bound
  void combine();
  template <typename T>
  T* keys(int layer, size_t head) const;
  template <typename T>
  T* values(int layer, size_t head) const;
  void add_rows(const float* from);
  void require_complete() const;

  const Library& lib_;
  DecoderSpec spec_;
  std::vector<float> frequencies_;
  std::vector<Layer> layers_;
  Layer head_;  // the final norm and the head
  std::vector<std::unique_ptr<Operator>> kernels_;
  Pool pool_ = nullptr;
  uint8_t* arena_ = nullptr;
  size_t arena_bytes_ = 0;
  int embedding_precision_ = -1;
  const void* embedding_codes_ = nullptr;
  const void* embedding_scales_ = nullptr;

  std::vector<size_t> small_places_;  // of each layer's tensors in `smalls_`, the final norm's first
  size_t query_dim_ = 0, key_dim_ = 0, projected_ = 0, plain_dim_ = 0, inner_ = 0, padded_ = 0, positions_ = 0,
         top_k_ = 0, most_experts_ = 0, score_rows_ = 0;
  Buffer smalls_, cosines_, sines_, key_cache_, value_cache_, x_, normed_, projection_, latent_, latent_normed_,
      expanded_, key_row_, attended_, gate_up_, inner_rows_, outputs_, shared_, router_, logits_, scratch_, workspace_;
  Input hidden_input_, other_input_, gathered_input_;

  size_t tokens_ = 0, position_ = 0, filled_ = 0;
  int layer_ = 0;
  bool every_logit_ = false, finished_ = false, waiting_ = false, logits_ready_ = false;
  Event event_;
};

template <typename Task>
void Engine::parallel(size_t count, const Task& task) {
  if (pool_ == nullptr || count < 2) {
    for (size_t i = 0; i < count; ++i) task(size_t{0}, i);
    return;
  }
  lib_.parallel(
      pool_, [](void* context, size_t thread, size_t i) { (*static_cast<const Task*>(context))(thread, i); },
      const_cast<Task*>(&task), count, 0);
}

}  // namespace edgeflex
