// Reads `count` 64-bit words and returns their sum: what memory gives one thread at most.
// compare_cpu.py compiles this and calls it from as many threads as it measures with.
#include <stddef.h>
#include <stdint.h>

uint64_t read_words(const uint64_t* words, size_t count) {
  uint64_t sums[32] = {0};
  for (size_t i = 0; i + 32 <= count; i += 32) {
    for (size_t j = 0; j < 32; ++j) sums[j] += words[i + j];
    __builtin_prefetch(words + i + 1024);
    __builtin_prefetch(words + i + 1032);
    __builtin_prefetch(words + i + 1040);
    __builtin_prefetch(words + i + 1048);
  }
  uint64_t sum = 0;
  for (size_t j = 0; j < 32; ++j) sum += sums[j];
  return sum;
}
