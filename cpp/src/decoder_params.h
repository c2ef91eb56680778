// What the kernels that keep a decoder's rows are given. See ssmcore/decoder.h.
#pragma once

#include <cstdint>

namespace ssmcore {

// What is known of a sequence, by slot; and a copy for each row of a step.
struct DecoderRow {
  int64_t token_id;  // drawn last
  int64_t position;  // of the next draw
  int64_t seed;
  float temperature, top_p, min_p, repetition_penalty;
  int32_t top_k;
  int32_t history_length;
};

struct DecoderRowsParams {
  int64_t rows, max_rows;
  const int32_t* slots;  // (rows), negative for a row that only fills up
  DecoderRow* by_slot;
  DecoderRow* of_step;       // (rows)
  int64_t history_capacity;  // 0: no histories
  int32_t* history_by_slot;  // (slots, capacity): ids, then -1
  int32_t* history_of_step;  // (rows, capacity)
  int64_t* drawn;            // (2, max_rows), in turns
  uint64_t* num_drawn;
};

// A row that stands for nothing.
inline constexpr DecoderRow kNoDecoderRow = {0, 0, 0, 0.0f, 1.0f, 0.0f, 1.0f, 0, 0};

}  // namespace ssmcore
