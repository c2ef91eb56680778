// Expecting an Error.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "ssmcore/error.h"

// Calls f, which must throw an Error of this code whose message holds `expected`.
template <typename F>
void check_error(ssmcore::ErrorCode code, const std::string& expected, F f) {
  try {
    f();
  } catch (const ssmcore::Error& error) {
    const std::string message = error.what();
    CHECK(error.code() == code);
    CHECK_MESSAGE(message.find(expected) != std::string::npos,
                  "expected \"" << expected << "\", got: " << message);
    return;
  }
  FAIL_CHECK("accepted; expected \"" << expected << '"');
}
