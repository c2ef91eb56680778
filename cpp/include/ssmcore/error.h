// The one exception type of ssmcore.
#pragma once

#include <stdexcept>
#include <string>

namespace ssmcore {

enum class ErrorCode {
  invalid_argument,    // a shape, dtype, device, value or combination the operation does not take
  not_found,           // a file or folder that does not exist or cannot be read
  invalid_checkpoint,  // a file that is damaged or does not describe a model ssmcore knows
  out_of_memory,
  unsupported,  // valid, but not available in this build or on this device
  device_error,
  internal,
  not_finite,  // training met an infinity or a NaN
};

// Every failure is reported by throwing this. The message names the operation, the argument, what
// was expected and what came: "selective_scan: C has dstate 8, A has 16".
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace ssmcore
