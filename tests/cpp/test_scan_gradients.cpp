// What the scan's backward refuses, as C++ callers see it; the Python tests go through the rest.
#include <doctest/doctest.h>

#include <vector>

#include "check_error.h"
#include "ssmcore/selective_scan.h"

using namespace ssmcore;

namespace {

constexpr auto kInvalid = ErrorCode::invalid_argument;

// A valid backward of batch 2, dim 3, seqlen 5, dstate 4, to be spoilt.
struct Backward {
  std::vector<float> memory = std::vector<float>(1000, 0.5f);
  std::vector<float> du = std::vector<float>(30), dA = std::vector<float>(12);
  Context context;
  SelectiveScanBwdArgs args;

  Backward() {
    args.u = args.delta = args.dout = TensorView(memory.data(), DType::float32, {2, 3, 5});
    args.A = TensorView(memory.data(), DType::float32, {3, 4});
    args.B = args.C = TensorView(memory.data(), DType::float32, {2, 4, 5});
    args.du.tensor = TensorView(du.data(), DType::float32, {2, 3, 5});
    args.dA.tensor = TensorView(dA.data(), DType::float32, {3, 4});
  }
  void run() const {
    const Buffer workspace(context.allocator(), selective_scan_bwd_workspace_size(args, context),
                           "a test");
    selective_scan_bwd(args, {context, nullptr, workspace.data(), workspace.bytes()});
  }
  void check_refused(const std::string& expected) const {
    check_error(kInvalid, "selective_scan_bwd: " + expected, [&] { run(); });
  }
};

}  // namespace

TEST_CASE("selective_scan_bwd: the spoilt call is valid to begin with") {
  const Backward backward;
  backward.run();
  CHECK(backward.du[0] != 0.0f);
  CHECK(backward.dA[0] != 0.0f);
}

TEST_CASE("selective_scan_bwd: without any gradient there is nothing to do") {
  Backward backward;
  backward.args.du = backward.args.dA = {};
  backward.run();
  CHECK(backward.du == std::vector<float>(30));
}

TEST_CASE("selective_scan_bwd: missing tensors") {
  for (TensorView SelectiveScanBwdArgs::* member :
       {&SelectiveScanBwdArgs::u, &SelectiveScanBwdArgs::delta, &SelectiveScanBwdArgs::A,
        &SelectiveScanBwdArgs::B, &SelectiveScanBwdArgs::C, &SelectiveScanBwdArgs::dout}) {
    Backward backward;
    backward.args.*member = TensorView();
    backward.check_refused("");
    check_error(kInvalid, "is missing", [&] { backward.run(); });
  }
}

TEST_CASE("selective_scan_bwd: gradients without memory, on other devices, of what is not there") {
  {
    Backward backward;
    backward.args.du.tensor.data = nullptr;
    backward.check_refused("du has no memory");
  }
  {
    Backward backward;
    backward.args.dA.tensor.device = {DeviceType::cuda, 1};
    backward.check_refused("dA is on cuda:1, expected cpu");
  }
  {
    Backward backward;
    backward.args.dz.tensor = backward.args.du.tensor;
    backward.check_refused("dz is asked for, but z is missing");
  }
  {
    Backward backward;
    backward.args.chunk_states = TensorView(backward.memory.data(), DType::float32, {2, 1, 3, 4});
    backward.check_refused("chunk_size is 0, expected at least 1");
  }
}

TEST_CASE("selective_scan_bwd: state_indices") {
  Backward backward;
  std::vector<float> states(4 * 3 * 4);
  backward.args.dinitial_state.tensor = TensorView(states.data(), DType::float32, {4, 3, 4});
  int32_t indices[] = {3, 3};
  backward.args.state_indices = TensorView(indices, DType::int32, {2});
  backward.check_refused("state_indices holds slot 3 twice");
  indices[0] = 4;
  backward.check_refused("state_indices[0] is 4, the state has 4 slots");
  indices[0] = -1;
  backward.run();
  CHECK(states[0] == 0.0f);
  CHECK(states[3 * 12] != 0.0f);
}

TEST_CASE("selective_scan_bwd: a workspace that is too small, and problems too large for one") {
  const Backward backward;
  const size_t needed = selective_scan_bwd_workspace_size(backward.args, backward.context);
  const Buffer workspace(cpu_allocator(), needed, "a test");
  check_error(kInvalid, "workspace has " + std::to_string(needed - 1) + " bytes, expected", [&] {
    selective_scan_bwd(backward.args, {backward.context, nullptr, workspace.data(), needed - 1});
  });

  // Only sizes matter to the question; the answer must not wrap around.
  Backward huge;
  const int64_t steps = int64_t{1} << 58;
  huge.args.u = huge.args.delta = huge.args.dout =
      TensorView(huge.memory.data(), DType::float32, {1, 1, steps}, {0, 0, 0});
  huge.args.A = TensorView(huge.memory.data(), DType::float32, {1, 8});
  huge.args.B = huge.args.C =
      TensorView(huge.memory.data(), DType::float32, {1, 8, steps}, {0, 0, 0});
  huge.args.du = {};
  huge.args.dA.tensor = TensorView(huge.dA.data(), DType::float32, {1, 8});
  CHECK(selective_scan_bwd_workspace_size(huge.args, huge.context) > size_t{1} << 60);
}
