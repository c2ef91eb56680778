// Continues a prompt, always with the likeliest token, by a model whose tokens are bytes:
//   generate FOLDER PROMPT
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "ssmcore/error.h"
#include "ssmcore/language_model.h"

using namespace ssmcore;

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: generate FOLDER PROMPT\n";
    return 2;
  }
  const Context context;
  const LanguageModel model(open_checkpoint(argv[1]), context);
  const std::string prompt = argv[2];

  // The caller owns all memory: the sequence's state, the logits and the workspace.
  ModelState state = model.new_state(1);
  const int64_t vocab_size = model.config().vocab_size;
  std::vector<float> logits(vocab_size);
  const size_t bytes = std::max(model.workspace_size(1, prompt.size(), context),
                                model.workspace_size(1, 1, context));
  const Buffer workspace(context.allocator(), bytes, "the workspace");
  const Exec exec{context, nullptr, workspace.data(), workspace.bytes()};

  LanguageModelFwdArgs args;
  args.state = &state;
  args.logits = TensorView(logits.data(), DType::float32, {1, vocab_size});

  // First the whole prompt, then each token as it is chosen.
  std::vector<int32_t> ids;
  for (const unsigned char byte : prompt) ids.push_back(byte);
  for (int i = 0; i < 256; ++i) {
    const int64_t seqlen = static_cast<int64_t>(ids.size());
    args.token_ids = TensorView(ids.data(), DType::int32, {1, seqlen});
    model.forward(args, exec);
    const auto likeliest = std::max_element(logits.begin(), logits.end());
    ids = {static_cast<int32_t>(likeliest - logits.begin())};
    std::cout << static_cast<char>(ids[0]) << std::flush;
  }
} catch (const Error& error) {
  std::cerr << "generate: " << error.what() << '\n';
  return 2;
}
