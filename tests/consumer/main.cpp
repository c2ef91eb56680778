// Multiplies two matrices through the installed library, and catches its
// error.
#include <cstdio>
#include <vector>

#include "ssmcore/error.h"
#include "ssmcore/linear.h"
#include "ssmcore/version.h"

using namespace ssmcore;

int main() {
  constexpr int64_t n = 96;
  std::vector<float> x(n * n, 0.5f), weight(n * n, 2.0f), out(n * n);
  const Context context;
  LinearArgs args;
  args.x = TensorView(x.data(), DType::float32, {n, n});
  args.weight = TensorView(weight.data(), DType::float32, {n, n});
  args.out = TensorView(out.data(), DType::float32, {n, n});
  const Buffer workspace(context.allocator(), linear_workspace_size(args, context), "linear");
  linear(args, {context, nullptr, workspace.data(), workspace.bytes()});
  for (const float value : out)
    if (value != n) return 1;

  try {
    linear({}, {context});
    return 2;
  } catch (const Error& error) {
    std::printf("ssmcore %s: product right, error caught: %s\n", SSMCORE_VERSION_STRING,
                error.what());
  }
}
