// cuBLASLt counts down the columns: what it is asked for is outᵀ = weight xᵀ, where a row of ours
// is a column.
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
// On a batch-invariant context the algorithm is the one for this many rows.
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

// A matrix whose rows are contiguous.
struct Matrix {
  DType dtype;
  int64_t rows, cols, stride;
  int64_t alignment;  // of every row, and of any row alone

  Matrix(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride)
      : dtype(dtype), rows(rows), cols(cols), stride(stride) {
    const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    const int64_t stride_bytes = stride * static_cast<int64_t>(dtype_size(dtype));
    alignment = std::min(alignment_of(address), alignment_of(stride_bytes));
  }
};

struct Matrices {
  Matrix weight, x, out;

  explicit Matrices(const LinearParams& p)
      : weight(p.weight, p.weight_dtype, p.out_features, p.in_features, p.weight_row_stride),
        x(p.x.data, p.dtype, p.rows, p.in_features, p.x.stride[0]),
        out(p.out.data, p.out_dtype, p.rows, p.out_features, p.out.stride[0]) {}

  // Those of a product of the same features and types, with kInvariantRows and no gaps.
  static Matrices invariant(LinearParams p) {
    p.rows = kInvariantRows;
    p.weight = p.x.data = p.out.data = nullptr;
    p.weight_row_stride = p.x.stride[0] = p.in_features;
    p.out.stride[0] = p.out_features;
    return Matrices(p);
  }

  bool at_least_as_aligned_as(const Matrices& other) const {
    return weight.alignment >= other.weight.alignment && x.alignment >= other.x.alignment &&
           out.alignment >= other.out.alignment;
  }
};

// Whether the operands are such as cuBLASLt takes. This does not depend on the number of rows, so
// that batch-invariant products of any number go the same way.
bool can_describe(const LinearParams& p) {
  const bool bias = !p.bias || (p.bias_dtype == p.out_dtype && p.bias.stride[0] == 1 &&
                                is_aligned(p.bias.data, 16));
  return p.dtype == p.weight_dtype && bias && p.x.stride[1] == 1 && p.out.stride[1] == 1 &&
         p.x.stride[0] >= p.in_features && p.weight_row_stride >= p.in_features &&
         p.out.stride[0] >= p.out_features;
}

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
  OwnedLayout weight, x, out;

  Layouts(const CublasLt& lt, const Matrices& matrices) : weight(lt), x(lt), out(lt) {
    const auto create = [&](OwnedLayout& layout, const Matrix& matrix) {
      check(lt, lt.layout_create(layout.address(), data_type(matrix.dtype), matrix.cols,
                                 matrix.rows, matrix.stride));
    };
    create(weight, matrices.weight);
    create(x, matrices.x);
    create(out, matrices.out);
  }
};

size_t plan_workspace_size(const LinearParams& p) {
  const int64_t sums = p.rows * p.out_features * static_cast<int64_t>(sizeof(float) * kMaxSplits);
  const int64_t aligned = ceil_div(sums, kWorkspaceAlignment) * kWorkspaceAlignment;
  return std::min(static_cast<size_t>(aligned), kMaxWorkspaceBytes);
}

}  // namespace

struct LinearPlans::Plan {
  Owned<CublasLt::Operation, &CublasLt::operation_destroy> operation;
  Layouts layouts;
  std::optional<CublasLt::Algorithm> algorithm;

  Plan(const CublasLt& lt, CublasLt::Handle handle, const LinearParams& p, bool batch_invariant)
      : operation(lt), layouts(lt, Matrices(p)) {
    check(lt, lt.operation_create(operation.address(), CublasLt::kCompute32F, CUDA_R_32F));
    set(lt, CublasLt::OperationAttribute::transpose_a, CublasLt::kTransposed);
    if (p.bias) {
      set(lt, CublasLt::OperationAttribute::epilogue, CublasLt::kAddBias);
      set(lt, CublasLt::OperationAttribute::bias_data_type,
          static_cast<int32_t>(data_type(p.bias_dtype)));
      set_bias(lt, p);
    }
    const Matrices matrices(p);
    if (!batch_invariant) {
      // No parts of a sum are rounded to 16 bits before they are added up.
      const uint32_t reductions = CublasLt::kReductionInComputeType |
                                  (p.out_dtype == DType::float32 ? CublasLt::kReductionInPlace : 0);
      algorithm = best(lt, handle, matrices, layouts, plan_workspace_size(p), reductions);
      return;
    }
    // One algorithm for any number of rows, with sums in one piece: one order of each.
    const Matrices invariant = Matrices::invariant(p);
    if (!matrices.at_least_as_aligned_as(invariant)) return;
    algorithm = best(lt, handle, invariant, Layouts(lt, invariant), 0, 0);
    CublasLt::Heuristic result;
    if (algorithm)
      check(lt, lt.check(handle, operation, layouts.weight, layouts.x, layouts.out, layouts.out,
                         &*algorithm, &result));
  }

  void set_bias(const CublasLt& lt, const LinearParams& p) {
    set(lt, CublasLt::OperationAttribute::bias_pointer, p.bias.data);
  }

 private:
  template <typename Value>
  void set(const CublasLt& lt, CublasLt::OperationAttribute attribute, Value value) {
    check(lt, lt.operation_set(operation, attribute, &value, sizeof value));
  }

  std::optional<CublasLt::Algorithm> best(const CublasLt& lt, CublasLt::Handle handle,
                                          const Matrices& matrices, const Layouts& described,
                                          uint64_t workspace_bytes, uint32_t reductions) {
    using Attribute = CublasLt::PreferenceAttribute;
    Owned<CublasLt::Preference, &CublasLt::preference_destroy> preference(lt);
    check(lt, lt.preference_create(preference.address()));
    const auto prefer = [&](Attribute attribute, auto value) {
      check(lt, lt.preference_set(preference, attribute, &value, sizeof value));
    };
    prefer(Attribute::max_workspace_bytes, workspace_bytes);
    prefer(Attribute::reduction_scheme_mask, reductions);
    prefer(Attribute::min_alignment_a, static_cast<uint32_t>(matrices.weight.alignment));
    prefer(Attribute::min_alignment_b, static_cast<uint32_t>(matrices.x.alignment));
    prefer(Attribute::min_alignment_c, static_cast<uint32_t>(matrices.out.alignment));
    prefer(Attribute::min_alignment_d, static_cast<uint32_t>(matrices.out.alignment));
    CublasLt::Heuristic result;
    int count = 0;
    const CublasLt::Status status =
        lt.heuristic(handle, operation, described.weight, described.x, described.out, described.out,
                     preference, 1, &result, &count);
    if (status != CublasLt::kSuccess || count == 0 || result.status != CublasLt::kSuccess)
      return {};
    return result.algorithm;
  }
};

size_t LinearPlans::workspace_size(const LinearParams& p) {
  return plan_workspace_size(p) + kWorkspaceAlignment;
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

LinearPlans::Plan& LinearPlans::plan(const LinearParams& p, bool batch_invariant) {
  const Matrices m(p);
  const Key key = {static_cast<int64_t>(p.dtype),
                   static_cast<int64_t>(p.out_dtype),
                   p.bias.data != nullptr,
                   p.rows,
                   p.in_features,
                   p.out_features,
                   m.weight.stride,
                   m.x.stride,
                   m.out.stride,
                   m.weight.alignment,
                   m.x.alignment,
                   m.out.alignment};
  if (plans_.size() >= kMaxPlans) plans_.clear();
  std::unique_ptr<Plan>& plan = plans_[key];
  if (!plan) plan = std::make_unique<Plan>(lt_, handle_, p, batch_invariant);
  return *plan;
}

bool LinearPlans::run(const LinearParams& p, const Exec& exec) {
  if (!can_describe(p)) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  Plan& plan = this->plan(p, exec.context.batch_invariant());
  if (!plan.algorithm) return false;
  if (p.bias) plan.set_bias(lt_, p);
  const float one = 1.0f, zero = 0.0f;
  const uintptr_t workspace = reinterpret_cast<uintptr_t>(exec.workspace);
  void* const aligned = reinterpret_cast<void*>((workspace + kWorkspaceAlignment - 1) /
                                                kWorkspaceAlignment * kWorkspaceAlignment);
  check(lt_, lt_.matmul(handle_, plan.operation, &one, p.weight, plan.layouts.weight, p.x.data,
                        plan.layouts.x, &zero, p.out.data, plan.layouts.out, p.out.data,
                        plan.layouts.out, &*plan.algorithm, aligned, plan_workspace_size(p),
                        static_cast<cudaStream_t>(exec.stream)));
  return true;
}

}  // namespace ssmcore::cuda
