// cuBLASLt counts down the columns: what it is asked for is outᵀ = b aᵀ, where a row of ours is a
// column.
#include <algorithm>
#include <optional>
#include <string>

#include "launch.h"
#include "linear_plans.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

constexpr size_t kMaxWorkspaceBytes = size_t{32} << 20;
constexpr size_t kMaxSplits = 16;  // of a sum that a small workspace has room for
constexpr uintptr_t kWorkspaceAlignment = 256;
constexpr size_t kMaxPlans = 4096;
// Of a batch-invariant product the algorithm is the one for this many rows of a.
constexpr int64_t kInvariantRows = 256;

void check(const CublasLt& lt, CublasLt::Status status) {
  if (status != CublasLt::kSuccess)
    throw Error(ErrorCode::device_error,
                std::string("linear: cuBLASLt reports ") + lt.status_name(status));
}

cudaDataType_t data_type(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return CUDA_R_16BF;
    case DType::float16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// The largest power of two that divides n, 16 at most.
int64_t alignment_of(int64_t n) {
  return n == 0 ? 16 : std::min<int64_t>(n & -n, 16);
}

// An operand as cuBLASLt sees it: `count` runs of `length` adjacent elements, `stride` apart.
struct Runs {
  DType dtype;
  bool along_rows;  // of the matrix; else each run is a column
  int64_t length, count, stride;
  int64_t alignment;  // of every run, and of any run alone

  Runs(const MatrixProduct::Matrix& matrix, int64_t rows, int64_t cols)
      : dtype(matrix.dtype),
        along_rows(matrix.stride[1] == 1),
        length(along_rows ? cols : rows),
        count(along_rows ? rows : cols),
        stride(matrix.stride[along_rows ? 0 : 1]) {
    const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(matrix.data));
    const int64_t stride_bytes = stride * static_cast<int64_t>(dtype_size(dtype));
    alignment = std::min(alignment_of(address), alignment_of(stride_bytes));
  }
};

struct Operands {
  Runs a, b, out;

  explicit Operands(const MatrixProduct& p)
      : a(p.a, p.m, p.k), b(p.b, p.n, p.k), out(p.out, p.m, p.n) {}

  // Those of a product of the same types, n and k, with kInvariantRows and no gaps.
  static Operands invariant(MatrixProduct p) {
    const auto close = [](MatrixProduct::Matrix& matrix, int64_t rows, int64_t cols) {
      matrix.data = nullptr;
      const bool along_rows = matrix.stride[1] == 1;
      matrix.stride[along_rows ? 0 : 1] = along_rows ? cols : rows;
    };
    p.m = kInvariantRows;
    close(p.a, p.m, p.k);
    close(p.b, p.n, p.k);
    close(p.out, p.m, p.n);
    return Operands(p);
  }

  bool at_least_as_aligned_as(const Operands& other) const {
    return a.alignment >= other.a.alignment && b.alignment >= other.b.alignment &&
           out.alignment >= other.out.alignment;
  }
};

// One of cuBLASLt's objects.
template <typename Object, auto kDestroy>
class Owned {
 public:
  explicit Owned(const CublasLt& lt) : lt_(lt) {}
  ~Owned() {
    if (object_) (lt_.*kDestroy)(object_);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Object* address() { return &object_; }
  operator Object() const { return object_; }

 private:
  const CublasLt& lt_;
  Object object_ = nullptr;
};

using OwnedLayout = Owned<CublasLt::Layout, &CublasLt::layout_destroy>;

struct Layouts {
  OwnedLayout a, b, out;

  Layouts(const CublasLt& lt, const Operands& operands) : a(lt), b(lt), out(lt) {
    const auto create = [&](OwnedLayout& layout, const Runs& runs) {
      check(lt, lt.layout_create(layout.address(), data_type(runs.dtype), runs.length, runs.count,
                                 runs.stride));
    };
    create(a, operands.a);
    create(b, operands.b);
    create(out, operands.out);
  }
};

size_t plan_workspace_size(const MatrixProduct& p) {
  const int64_t sums = p.m * p.n * static_cast<int64_t>(sizeof(float) * kMaxSplits);
  const int64_t aligned = ceil_div(sums, kWorkspaceAlignment) * kWorkspaceAlignment;
  return std::min(static_cast<size_t>(aligned), kMaxWorkspaceBytes);
}

}  // namespace

struct LinearPlans::Plan {
  Owned<CublasLt::Operation, &CublasLt::operation_destroy> operation;
  Layouts layouts;
  std::optional<CublasLt::Algorithm> algorithm;

  Plan(const CublasLt& lt, CublasLt::Handle handle, const MatrixProduct& p, bool batch_invariant)
      : operation(lt), layouts(lt, Operands(p)) {
    using Attribute = CublasLt::OperationAttribute;
    const Operands operands(p);
    check(lt, lt.operation_create(operation.address(), CublasLt::kCompute32F, CUDA_R_32F));
    set(lt, Attribute::transpose_a,
        operands.b.along_rows ? CublasLt::kTransposed : CublasLt::kAsItIs);
    set(lt, Attribute::transpose_b,
        operands.a.along_rows ? CublasLt::kAsItIs : CublasLt::kTransposed);
    if (p.bias) {
      set(lt, Attribute::epilogue, CublasLt::kAddBias);
      set(lt, Attribute::bias_data_type, static_cast<int32_t>(data_type(p.bias_dtype)));
      set_bias(lt, p);
    }
    if (!batch_invariant) {
      // No parts of a sum are rounded to 16 bits before they are added up.
      const uint32_t reductions = CublasLt::kReductionInComputeType |
                                  (p.out.dtype == DType::float32 ? CublasLt::kReductionInPlace : 0);
      algorithm = best(lt, handle, operands, layouts, plan_workspace_size(p), reductions);
      return;
    }
    // One algorithm for any number of rows, with sums in one piece: one order of each.
    const Operands invariant = Operands::invariant(p);
    if (!operands.at_least_as_aligned_as(invariant)) return;
    algorithm = best(lt, handle, invariant, Layouts(lt, invariant), 0, 0);
    CublasLt::Heuristic result;
    if (algorithm)
      check(lt, lt.check(handle, operation, layouts.b, layouts.a, layouts.out, layouts.out,
                         &*algorithm, &result));
  }

  void set_bias(const CublasLt& lt, const MatrixProduct& p) {
    set(lt, CublasLt::OperationAttribute::bias_pointer, p.bias.data);
  }

 private:
  template <typename Value>
  void set(const CublasLt& lt, CublasLt::OperationAttribute attribute, Value value) {
    check(lt, lt.operation_set(operation, attribute, &value, sizeof value));
  }

  std::optional<CublasLt::Algorithm> best(const CublasLt& lt, CublasLt::Handle handle,
                                          const Operands& operands, const Layouts& described,
                                          uint64_t workspace_bytes, uint32_t reductions) {
    using Attribute = CublasLt::PreferenceAttribute;
    Owned<CublasLt::Preference, &CublasLt::preference_destroy> preference(lt);
    check(lt, lt.preference_create(preference.address()));
    const auto prefer = [&](Attribute attribute, auto value) {
      check(lt, lt.preference_set(preference, attribute, &value, sizeof value));
    };
    prefer(Attribute::max_workspace_bytes, workspace_bytes);
    prefer(Attribute::reduction_scheme_mask, reductions);
    prefer(Attribute::min_alignment_a, static_cast<uint32_t>(operands.b.alignment));
    prefer(Attribute::min_alignment_b, static_cast<uint32_t>(operands.a.alignment));
    prefer(Attribute::min_alignment_c, static_cast<uint32_t>(operands.out.alignment));
    prefer(Attribute::min_alignment_d, static_cast<uint32_t>(operands.out.alignment));
    CublasLt::Heuristic result;
    int count = 0;
    const CublasLt::Status status =
        lt.heuristic(handle, operation, described.b, described.a, described.out, described.out,
                     preference, 1, &result, &count);
    if (status != CublasLt::kSuccess || count == 0 || result.status != CublasLt::kSuccess)
      return {};
    return result.algorithm;
  }
};

// This does not depend on m, so that batch-invariant products of any number of rows go the same
// way.
bool LinearPlans::takes(const MatrixProduct& p) {
  const auto has_runs = [](const Runs& runs, const MatrixProduct::Matrix& matrix) {
    return (runs.along_rows || matrix.stride[0] == 1) && runs.stride >= runs.length;
  };
  const Operands operands(p);
  return p.a.dtype == p.b.dtype && (p.out.dtype == p.a.dtype || p.out.dtype == DType::float32) &&
         has_runs(operands.a, p.a) && has_runs(operands.b, p.b) && has_runs(operands.out, p.out) &&
         operands.out.along_rows &&
         (!p.bias ||
          (p.bias_dtype == p.out.dtype && p.bias.stride[0] == 1 && is_aligned(p.bias.data, 16)));
}

size_t LinearPlans::workspace_size(const MatrixProduct& p) {
  return takes(p) ? plan_workspace_size(p) + kWorkspaceAlignment : 0;
}

LinearPlans::LinearPlans() : lt_(cublaslt()) {
  // It may allocate, which is allowed while a graph is captured if asked for.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cuda::check(cudaThreadExchangeStreamCaptureMode(&mode), "linear");
  const CublasLt::Status status = lt_.create(&handle_);
  cuda::check(cudaThreadExchangeStreamCaptureMode(&mode), "linear");
  check(lt_, status);
}

LinearPlans::~LinearPlans() {
  plans_.clear();
  lt_.destroy(handle_);
}

LinearPlans::Plan& LinearPlans::plan(const MatrixProduct& p, bool batch_invariant) {
  const Operands operands(p);
  Key key = {p.m, p.n, p.k, p.bias.data != nullptr, batch_invariant};
  auto place = key.begin() + 5;
  for (const Runs& runs : {operands.a, operands.b, operands.out}) {
    *place++ = static_cast<int64_t>(runs.dtype);
    *place++ = runs.along_rows;
    *place++ = runs.stride;
    *place++ = runs.alignment;
  }
  if (plans_.size() >= kMaxPlans) plans_.clear();
  std::unique_ptr<Plan>& plan = plans_[key];
  if (!plan) plan = std::make_unique<Plan>(lt_, handle_, p, batch_invariant);
  return *plan;
}

bool LinearPlans::run(const MatrixProduct& p, bool batch_invariant, const Exec& exec) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Plan& plan = this->plan(p, batch_invariant);
  if (!plan.algorithm) return false;
  if (p.bias) plan.set_bias(lt_, p);
  const float one = 1.0f, of_out = p.accumulate ? 1.0f : 0.0f;
  const uintptr_t workspace = reinterpret_cast<uintptr_t>(exec.workspace);
  void* const aligned = reinterpret_cast<void*>((workspace + kWorkspaceAlignment - 1) /
                                                kWorkspaceAlignment * kWorkspaceAlignment);
  check(lt_, lt_.matmul(handle_, plan.operation, &one, p.b.data, plan.layouts.b, p.a.data,
                        plan.layouts.a, &of_out, p.out.data, plan.layouts.out, p.out.data,
                        plan.layouts.out, &*plan.algorithm, aligned, plan_workspace_size(p),
                        static_cast<cudaStream_t>(exec.stream)));
  return true;
}

}  // namespace ssmcore::cuda
