#include "device.h"

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "ssmcore/error.h"
#include "ssmcore/stream.h"

namespace ssmcore {
namespace {

struct DeviceContexts {
  std::unique_ptr<Context> plain, batch_invariant;
  std::optional<Stream> stream;
};

// Never destroyed: threads may still be using them when the interpreter ends.
struct Contexts {
  std::mutex mutex;
  std::map<std::pair<DeviceType, int>, DeviceContexts> of_device;

  static Contexts& all() {
    static Contexts& contexts = *new Contexts;
    return contexts;
  }
};

}  // namespace

Context& context_of(Device device, bool batch_invariant) {
  Contexts& all = Contexts::all();
  const std::lock_guard<std::mutex> lock(all.mutex);
  DeviceContexts& contexts = all.of_device[{device.type, device.index}];
  const bool invariant = batch_invariant && device.type == DeviceType::cuda;
  std::unique_ptr<Context>& context = invariant ? contexts.batch_invariant : contexts.plain;
  if (!context) {
    ContextOptions options;
    options.batch_invariant = invariant;
    context = std::make_unique<Context>(device, options);
  }
  return *context;
}

void* own_stream(Device device) {
  const Context& context = context_of(device);
  Contexts& all = Contexts::all();
  const std::lock_guard<std::mutex> lock(all.mutex);
  std::optional<Stream>& stream = all.of_device[{device.type, device.index}].stream;
  if (!stream) stream.emplace(context);
  return stream->handle();
}

Device parse_device(const std::string& name) {
  if (name == "cpu") return {};
  if (name == "cuda") return {DeviceType::cuda, 0};
  const std::string prefix = "cuda:", digits = name.substr(std::min(prefix.size(), name.size()));
  const bool is_number = !digits.empty() && digits.size() < 5 &&
                         digits.find_first_not_of("0123456789") == std::string::npos;
  if (name.compare(0, prefix.size(), prefix) == 0 && is_number)
    return {DeviceType::cuda, std::stoi(digits)};
  throw Error(ErrorCode::invalid_argument,
              "device is '" + name + "', expected 'cpu', 'cuda' or 'cuda:' and a number");
}

}  // namespace ssmcore
