// What operators refuse, as C++ callers see it. The Python tests go through every argument; here
// are the ways that only C++ reaches: missing tensors and memory, other devices, workspaces.
#include <doctest/doctest.h>

#include <vector>

#include "check_error.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/embedding.h"
#include "ssmcore/linear.h"
#include "ssmcore/rms_norm.h"
#include "ssmcore/sample.h"
#include "ssmcore/selective_scan.h"
#include "ssmcore/selective_state_update.h"

using namespace ssmcore;

namespace {

constexpr auto kInvalid = ErrorCode::invalid_argument;

// A valid scan of batch 2, dim 3, seqlen 5, dstate 4, to be spoilt.
struct Scan {
  std::vector<float> memory = std::vector<float>(1000, 0.5f);
  std::vector<float> results = std::vector<float>(1000);
  Context context;
  SelectiveScanFwdArgs args;

  Scan() {
    args.u = args.delta = TensorView(memory.data(), DType::float32, {2, 3, 5});
    args.A = TensorView(memory.data(), DType::float32, {3, 4});
    args.B = args.C = TensorView(memory.data(), DType::float32, {2, 4, 5});
    args.out = TensorView(results.data(), DType::float32, {2, 3, 5});
  }
  void run() const {
    const Buffer workspace(context.allocator(), selective_scan_fwd_workspace_size(args, context),
                           "a test");
    selective_scan_fwd(args, {context, nullptr, workspace.data(), workspace.bytes()});
  }
  void check_refused(const std::string& expected) const {
    check_error(kInvalid, "selective_scan: " + expected, [&] { run(); });
  }
};

}  // namespace

TEST_CASE("selective_scan: the spoilt call is valid to begin with") {
  const Scan scan;
  scan.run();
  CHECK(scan.results[0] != 0.0f);
}

TEST_CASE("selective_scan: missing tensors") {
  for (TensorView SelectiveScanFwdArgs::* member :
       {&SelectiveScanFwdArgs::u, &SelectiveScanFwdArgs::delta, &SelectiveScanFwdArgs::A,
        &SelectiveScanFwdArgs::B, &SelectiveScanFwdArgs::C, &SelectiveScanFwdArgs::out}) {
    Scan scan;
    scan.args.*member = TensorView();
    scan.check_refused("");
    check_error(kInvalid, "is missing", [&] { scan.run(); });
  }
}

TEST_CASE("selective_scan: null memory, devices, strides, alignment") {
  {
    Scan scan;
    scan.args.u.data = nullptr;
    scan.check_refused("u has no memory");
  }
  {
    Scan scan;
    scan.args.delta.device = {DeviceType::cuda, 1};
    scan.check_refused("delta is on cuda:1, expected cpu");
  }
  {
    Scan scan;
    scan.args.u.strides[2] = -1;
    scan.check_refused("u has a negative stride in seqlen");
  }
  {
    Scan scan;
    scan.args.out.strides[1] = 0;
    scan.check_refused("out is written, but its strides make elements overlap");
  }
  {
    Scan scan;
    scan.args.A.data = reinterpret_cast<char*>(scan.memory.data()) + 1;
    scan.check_refused("A is not aligned to its dtype, float32");
  }
  {
    Scan scan;
    scan.args.out = scan.args.u;
    scan.check_refused("out is written, but overlaps u");
  }
}

TEST_CASE("selective_scan: shapes and dtypes name what was expected and what came") {
  {
    Scan scan;
    scan.args.C.shape[1] = 16;
    scan.check_refused("C has dstate 16, expected 4");
  }
  {
    Scan scan;
    scan.args.D = TensorView(scan.memory.data(), DType::bfloat16, {3});
    scan.check_refused("D has dtype bfloat16, expected float32");
  }
}

TEST_CASE("selective_scan: state_indices out of range and used twice") {
  Scan scan;
  std::vector<float> states(4 * 3 * 4);
  scan.args.initial_state = scan.args.last_state =
      TensorView(states.data(), DType::float32, {4, 3, 4});
  int32_t indices[] = {3, 3};
  scan.args.state_indices = TensorView(indices, DType::int32, {2});
  scan.check_refused("state_indices holds slot 3 twice");
  indices[0] = 4;
  scan.check_refused("state_indices[0] is 4, the state has 4 slots");
  indices[0] = -1;
  scan.run();
}

TEST_CASE("operators refuse a workspace that is too small, or none") {
  const Scan scan;
  const size_t needed = selective_scan_fwd_workspace_size(scan.args, scan.context);
  REQUIRE(needed > 0);
  const Buffer workspace(cpu_allocator(), needed, "a test");
  const auto run = [&](void* memory, size_t bytes) {
    selective_scan_fwd(scan.args, {scan.context, nullptr, memory, bytes});
  };
  const std::string expected = " bytes, expected " + std::to_string(needed);
  check_error(kInvalid, "workspace has " + std::to_string(needed - 1) + expected,
              [&] { run(workspace.data(), needed - 1); });
  check_error(kInvalid, "workspace has 0" + expected, [&] { run(nullptr, needed); });
  run(workspace.data(), needed);
}

TEST_CASE("linear refuses a weight format it does not know") {
  const Context context;
  LinearArgs args;
  args.weight.format = static_cast<WeightFormat>(7);
  check_error(kInvalid, "linear: weight has format 7, expected dense",
              [&] { linear(args, Exec{context}); });
}

TEST_CASE("every operator names itself and the first tensor it misses") {
  const Context context;
  const Exec exec{context};
  const auto check_named = [](const char* expected, auto run) {
    check_error(kInvalid, expected, run);
  };
  check_named("selective_scan: u is missing", [&] { selective_scan_fwd({}, exec); });
  check_named("selective_scan_bwd: u is missing", [&] { selective_scan_bwd({}, exec); });
  check_named("selective_state_update: x is missing", [&] { selective_state_update({}, exec); });
  check_named("causal_conv1d: x is missing", [&] { causal_conv1d_fwd({}, exec); });
  check_named("causal_conv1d_update: x ", [&] { causal_conv1d_update({}, exec); });
  check_named("rms_norm: x is missing", [&] { rms_norm_fwd({}, exec); });
  check_named("linear: x is missing", [&] { linear({}, exec); });
  check_named("embedding: token_ids is missing", [&] { embedding({}, exec); });
  check_named("sample: logits is missing", [&] { sample({}, exec); });
}
