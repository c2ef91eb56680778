/* Checks that end the program with a message, and tensors to call the C interface with. */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ssmcore/c_api.h"

#define CHECK(condition) check((condition) ? 1 : 0, __FILE__, __LINE__, #condition)
#define CHECK_OK(call) check_status((call), SSMCORE_OK, NULL, __FILE__, __LINE__, #call)
/* The call fails with this status, and its message holds `words`. */
#define CHECK_FAILS(call, status, words) \
  check_status((call), (status), (words), __FILE__, __LINE__, #call)

static inline void check(int holds, const char* file, int line, const char* text) {
  if (holds) return;
  fprintf(stderr, "%s:%d: %s\n", file, line, text);
  exit(1);
}

static inline void check_status(ssmcore_status status, ssmcore_status expected, const char* words,
                                const char* file, int line, const char* text) {
  const char* message = ssmcore_last_error();
  if (status == expected && (!words || strstr(message, words))) return;
  fprintf(stderr, "%s:%d: %s gave status %d, expected %d %s\n  last error: %s\n", file, line, text,
          status, expected, words ? words : "", message);
  exit(1);
}

static const ssmcore_dtype kFloat32 = SSMCORE_FLOAT32, kInt32 = SSMCORE_INT32;

/* A contiguous tensor in host memory with its own shape. */
typedef struct {
  ssmcore_tensor tensor;
  int64_t shape[3];
} Array;

static inline const ssmcore_tensor* array(Array* array, void* data, ssmcore_dtype dtype,
                                          int32_t ndim, int64_t size0, int64_t size1,
                                          int64_t size2) {
  const int64_t shape[] = {size0, size1, size2};
  memcpy(array->shape, shape, sizeof shape);
  memset(&array->tensor, 0, sizeof array->tensor);
  array->tensor.data = data;
  array->tensor.device.type = SSMCORE_DEVICE_CPU;
  array->tensor.ndim = ndim;
  array->tensor.dtype = dtype;
  array->tensor.shape = array->shape;
  return &array->tensor;
}
