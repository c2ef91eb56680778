// Trains a small model, whose tokens are bytes, on a text, and saves it as transformers reads it:
//   train TEXT FOLDER STEPS
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "ssmcore/error.h"
#include "ssmcore/initial_checkpoint.h"
#include "ssmcore/trainer.h"

using namespace ssmcore;

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: train TEXT FOLDER STEPS\n";
    return 2;
  }
  std::ifstream file(argv[1], std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  constexpr int64_t kBatch = 8, kLength = 128;
  if (text.size() <= kLength)
    throw Error(ErrorCode::not_found, std::string(argv[1]) + ": expected a longer text");

  const Context context;
  const ModelConfig config = parse_model_config(
      R"({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256})");
  LoadOptions load_options;
  load_options.trainable = true;
  LanguageModel model(initial_checkpoint(config, /*seed=*/0), context, load_options);

  TrainerOptions options;
  options.lr = 5e-3;
  options.total_steps = std::stoll(argv[3]);
  options.warmup_steps = options.total_steps / 10;
  Trainer trainer(model, options);

  std::mt19937_64 random;
  std::uniform_int_distribution<size_t> begin(0, text.size() - kLength - 1);
  std::vector<int32_t> token_ids(kBatch * kLength), targets(kBatch * kLength);
  while (trainer.steps_taken() < options.total_steps) {
    for (int64_t row = 0; row < kBatch; ++row) {
      const size_t from = begin(random);
      for (int64_t t = 0; t < kLength; ++t) {
        token_ids[row * kLength + t] = static_cast<unsigned char>(text[from + t]);
        targets[row * kLength + t] = static_cast<unsigned char>(text[from + t + 1]);
      }
    }
    const TrainerStep step =
        trainer.step(TensorView(token_ids.data(), DType::int32, {kBatch, kLength}),
                     TensorView(targets.data(), DType::int32, {kBatch, kLength}));
    std::cout << "step " << step.step << ": loss " << step.loss << '\n';
  }
  model.save(argv[2]);
} catch (const std::exception& error) {
  std::cerr << "train: " << error.what() << '\n';
  return 2;
}
