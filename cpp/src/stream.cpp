#include "ssmcore/stream.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cuda_backend.h"

namespace ssmcore {
namespace {

bool is_on_gpu(const Context& context) {
  return context.device().type == DeviceType::cuda;
}

}  // namespace

Stream::Stream(const Context& context) : context_(context) {
  if (is_on_gpu(context)) handle_ = cuda::make_stream(context.cuda());
}

Stream::~Stream() {
  if (handle_) cuda::destroy_stream(context_.cuda(), handle_);
}

void wait_for(const Context& context, void* stream, void* earlier) {
  if (is_on_gpu(context) && stream != earlier) cuda::wait_for(context.cuda(), stream, earlier);
}

void copy(const TensorView& source, const TensorView& target, const Exec& exec) {
  const Checks check("copy", exec.context.device());
  const auto check_view = [&](const TensorView& view, const std::string& name) {
    check.require(static_cast<bool>(view), [&] { return name + " is missing"; });
    check.require(view.is_contiguous(), [&] { return name + " is not contiguous"; });
    check.require(view.device == Device{} || view.device == exec.context.device(), [&] {
      return name + " is on " + to_string(view.device) + ", expected cpu or " +
             to_string(exec.context.device());
    });
  };
  check_view(source, "source");
  check_view(target, "target");
  check.require(source.dtype == target.dtype && source.rank == target.rank &&
                    std::equal(source.shape, source.shape + source.rank, target.shape),
                [&] {
                  return std::string("source is ") + dtype_name(source.dtype) + " " +
                         source.shape_string() + ", target is " + dtype_name(target.dtype) + " " +
                         target.shape_string();
                });
  const size_t bytes = source.nbytes();
  if (bytes == 0) return;
  if (source.device == Device{} && target.device == Device{}) {
    std::memmove(target.data, source.data, bytes);
    return;
  }
  cuda::DeviceState& device = exec.context.cuda();
  cuda::copy_bytes(device, target.data, source.data, bytes, exec.stream);
  // Pinned memory of the host would still be under way.
  if (source.device == Device{} || target.device == Device{})
    cuda::synchronize(device, exec.stream);
}

}  // namespace ssmcore
