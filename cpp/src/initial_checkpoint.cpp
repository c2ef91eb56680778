#include "ssmcore/initial_checkpoint.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "philox.h"
#include "strided.h"
#include "thread_pool.h"

namespace ssmcore {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements
constexpr double kPi = 3.14159265358979323846;
constexpr double kMinDelta = 1e-3, kMaxDelta = 1e-1, kDeltaFloor = 1e-4;
constexpr double kEmbeddingDeviation = 0.02;

// Tensors one after another, each with random numbers of its own.
class Weights {
 public:
  explicit Weights(uint64_t seed) : seed_(seed) {}

  template <typename Value>  // of an element's index
  void add(const std::string& name, std::initializer_list<int64_t> shape, const Value& value) {
    TensorView tensor(nullptr, DType::float32, shape);
    auto& data = memory_->emplace_back(static_cast<size_t>(tensor.numel()));
    const int64_t numel = tensor.numel();
    pool_.parallel_for(ceil_div(numel, kTask), pool_.num_threads(), [&](int64_t task, int) {
      for (int64_t i = task * kTask; i < std::min((task + 1) * kTask, numel); ++i)
        data[static_cast<size_t>(i)] = static_cast<float>(value(i));
    });
    tensor.data = data.data();
    tensors_[name] = tensor;
  }
  void add_constant(const std::string& name, std::initializer_list<int64_t> shape, double value) {
    add(name, shape, [&](int64_t) { return value; });
  }
  void add_uniform(const std::string& name, std::initializer_list<int64_t> shape, double bound) {
    add(name, shape, [&](int64_t i) { return bound * (2 * uniform(i).first - 1); });
  }
  // A matrix, or the convolution, whose rows have `fan_in` elements.
  void add_layer(const std::string& name, std::initializer_list<int64_t> shape, int64_t fan_in) {
    add_uniform(name, shape, 1 / std::sqrt(static_cast<double>(fan_in)));
  }
  void add_normal(const std::string& name, std::initializer_list<int64_t> shape, double deviation) {
    add(name, shape, [&](int64_t i) {  // Box and Muller's transform
      const auto [a, b] = uniform(i);
      return deviation * std::sqrt(-2 * std::log1p(-a)) * std::cos(2 * kPi * b);
    });
  }

  // Two numbers in [0, 1) for element i of the tensor that is being added.
  std::pair<double, double> uniform(int64_t i) const {
    const auto position = static_cast<uint64_t>(i);
    const auto words =
        philox4x32({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                    static_cast<uint32_t>(memory_->size()), 0},
                   seed_);
    const auto number = [](uint32_t low, uint32_t high) {
      return static_cast<double>((uint64_t{high} << 32 | low) >> 11) * 0x1p-53;
    };
    return {number(words[0], words[1]), number(words[2], words[3])};
  }

  TensorMap take() { return {std::move(tensors_), memory_}; }

 private:
  uint64_t seed_;
  ThreadPool pool_{available_cores()};
  std::map<std::string, TensorView> tensors_;
  std::shared_ptr<std::vector<std::vector<float>>> memory_ =
      std::make_shared<std::vector<std::vector<float>>>();
};

void add_mixer(const ModelConfig& config, const std::string& mixer, Weights& weights) {
  const int64_t d_model = config.d_model, dim = config.dim, dstate = config.dstate,
                dt_rank = config.dt_rank, width = config.width;
  weights.add_layer(mixer + "in_proj.weight", {2 * dim, d_model}, d_model);
  if (config.use_bias) weights.add_constant(mixer + "in_proj.bias", {2 * dim}, 0);
  weights.add_layer(mixer + "conv1d.weight", {dim, 1, width}, width);
  if (config.use_conv_bias) weights.add_layer(mixer + "conv1d.bias", {dim}, width);
  weights.add_layer(mixer + "x_proj.weight", {dt_rank + 2 * dstate, dim}, dim);
  weights.add_layer(mixer + "dt_proj.weight", {dim, dt_rank}, dt_rank);
  weights.add(mixer + "dt_proj.bias", {dim}, [&](int64_t i) {
    const double exponent =
        std::log(kMinDelta) + weights.uniform(i).first * std::log(kMaxDelta / kMinDelta);
    const double delta = std::max(std::exp(exponent), kDeltaFloor);
    return delta + std::log(-std::expm1(-delta));  // the inverse of softplus
  });
  weights.add(mixer + "A_log", {dim, dstate},
              [&](int64_t i) { return std::log(static_cast<double>(1 + i % dstate)); });
  weights.add_constant(mixer + "D", {dim}, 1);
  weights.add_uniform(
      mixer + "out_proj.weight", {d_model, dim},
      1 / std::sqrt(static_cast<double>(dim) * static_cast<double>(config.layers.size())));
  if (config.use_bias) weights.add_constant(mixer + "out_proj.bias", {d_model}, 0);
}

}  // namespace

Checkpoint initial_checkpoint(const ModelConfig& config, uint64_t seed) {
  Weights weights(seed);
  const int64_t d_model = config.d_model;
  weights.add_normal("backbone.embeddings.weight", {config.padded_vocab_size, d_model},
                     kEmbeddingDeviation);
  for (size_t i = 0; i < config.layers.size(); ++i) {
    const std::string layer = "backbone.layers." + std::to_string(i) + ".";
    weights.add_constant(layer + "norm.weight", {d_model}, 1);
    add_mixer(config, layer + "mixer.", weights);
  }
  weights.add_constant("backbone.norm_f.weight", {d_model}, 1);
  if (!config.tie_embeddings)
    weights.add_layer("lm_head.weight", {config.padded_vocab_size, d_model}, d_model);
  return {config, weights.take()};
}

}  // namespace ssmcore
