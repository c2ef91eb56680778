// Context: threads and instruction set, from options and from the environment.
#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

#include "check_error.h"
#include "ssmcore/context.h"
#include "ssmcore/version.h"
#include "thread_pool.h"

using namespace ssmcore;

namespace {

// Sets an environment variable for one scope; null unsets it.
class WithEnvironment {
 public:
  WithEnvironment(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) {
      before_ = before;
      was_set_ = true;
    }
    set(value);
  }
  ~WithEnvironment() { set(was_set_ ? before_.c_str() : nullptr); }
  WithEnvironment(const WithEnvironment&) = delete;
  WithEnvironment& operator=(const WithEnvironment&) = delete;

 private:
  void set(const char* value) const {
    if (value)
      setenv(name_, value, 1);
    else
      unsetenv(name_);
  }

  const char* name_;
  std::string before_;
  bool was_set_ = false;
};

ContextOptions threads(int n) {
  ContextOptions options;
  options.num_threads = n;
  return options;
}

}  // namespace

TEST_CASE("version.h agrees with itself") {
  CHECK(std::string(SSMCORE_VERSION_STRING) == std::to_string(SSMCORE_VERSION_MAJOR) + "." +
                                                   std::to_string(SSMCORE_VERSION_MINOR) + "." +
                                                   std::to_string(SSMCORE_VERSION_PATCH));
}

TEST_CASE("Context: threads come from the option, SSMCORE_NUM_THREADS, or the cores") {
  {
    const WithEnvironment unset("SSMCORE_NUM_THREADS", nullptr);
    CHECK(Context().num_threads() == available_cores());
    CHECK(Context({}, threads(3)).num_threads() == 3);
  }
  {
    const WithEnvironment empty("SSMCORE_NUM_THREADS", "");
    CHECK(Context().num_threads() == available_cores());
  }
  const WithEnvironment five("SSMCORE_NUM_THREADS", "5");
  CHECK(Context().num_threads() == 5);
  CHECK(Context({}, threads(3)).num_threads() == 3);
}

TEST_CASE("Context: thread counts out of range are refused") {
  for (const char* bad : {"0", "-2", "1025", "99999999999999999999"}) {
    const WithEnvironment set("SSMCORE_NUM_THREADS", bad);
    check_error(ErrorCode::invalid_argument, "SSMCORE_NUM_THREADS is ", [] { Context(); });
  }
  for (const char* bad : {"two", "2x", "1.5"}) {
    const WithEnvironment set("SSMCORE_NUM_THREADS", bad);
    check_error(ErrorCode::invalid_argument,
                "SSMCORE_NUM_THREADS is '" + std::string(bad) + "', expected a number",
                [] { Context(); });
  }
  check_error(ErrorCode::invalid_argument, "num_threads is -1, expected 1 to 1024",
              [] { Context({}, threads(-1)); });
  Context context({}, threads(2));
  for (const int bad : {0, -1, 1025})
    check_error(ErrorCode::invalid_argument, "set_num_threads: n is " + std::to_string(bad),
                [&] { context.set_num_threads(bad); });
  CHECK(context.num_threads() == 2);
  context.set_num_threads(4);
  CHECK(context.num_threads() == 4);
}

TEST_CASE("Context: SSMCORE_ISA names the instruction set, up to the machine's best") {
  {
    const WithEnvironment unset("SSMCORE_ISA", nullptr);
    CHECK(Context().isa() == detect_isa());
  }
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    const WithEnvironment set("SSMCORE_ISA", isa_name(isa));
    if (isa <= detect_isa())
      CHECK(Context().isa() == isa);
    else
      check_error(ErrorCode::unsupported, std::string("SSMCORE_ISA is ") + isa_name(isa),
                  [] { Context(); });
  }
  const WithEnvironment set("SSMCORE_ISA", "sse9");
  check_error(ErrorCode::invalid_argument,
              "SSMCORE_ISA is 'sse9', expected baseline, avx2 or avx512", [] { Context(); });
}
