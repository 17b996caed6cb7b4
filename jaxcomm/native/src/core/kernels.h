// Loops over memory, compiled once per instruction set and chosen at run time.
#pragma once

#include "types.h"

namespace jaxcomm {

// inout[i] = op(in[i], inout[i]).
using CombineFn = void (*)(const void* in, void* inout, int64_t n);
// data[i] /= divisor, correctly rounded; integers round toward zero.
using DivideFn = void (*)(void* data, int64_t n, int divisor);
// to[i] = from[i] / divisor; the two do not overlap.
using DivideCopyFn = void (*)(const void* from, void* to, int64_t n, int divisor);
// data[i] *= factor, in float32, rounded once.
using ScaleFn = void (*)(void* data, int64_t n, float factor);
// to[i] = from[i] * factor, rounded to nearest even.
using EncodeFn = void (*)(const float* from, void* to, int64_t n, float factor);
// to[i] = from[i] * factor / divisor.
using DecodeFn = void (*)(const void* from, float* to, int64_t n, float factor,
                          int divisor);
// acc[i] = op(from[i] * factor, acc[i]), in float32.
using AccumulateFn = void (*)(const void* from, float* acc, int64_t n, float factor);
// As memcpy, with stores that go past the caches where the processor has them.
using StreamFn = void (*)(void* to, const void* from, int64_t bytes);

// Entries that make no sense for a type are null.
struct Kernels {
  const char* name;
  CombineFn combine[kDTypes][kOps];
  DivideFn divide[kDTypes];
  DivideCopyFn divide_copy[kDTypes];
  ScaleFn scale[kDTypes];    // 16-bit floats
  EncodeFn encode[kDTypes];  // 16-bit floats, from float32
  DecodeFn decode[kDTypes];  // 16-bit floats, to float32
  AccumulateFn accumulate[kDTypes][kOps];  // sum and prod of 16-bit floats
  StreamFn stream;
};

// The kernels for this processor.
const Kernels& ChosenKernels();

}  // namespace jaxcomm
