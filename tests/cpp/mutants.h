// How long the tests of damaged input run.
#pragma once

#include <cstdlib>

// How many mutants a test tries: SSMCORE_TEST_MUTANTS, by default 20,000.
inline int num_mutants() {
  const char* number = std::getenv("SSMCORE_TEST_MUTANTS");
  return number ? std::atoi(number) : 20'000;
}
