// The fake NCCL's arithmetic: every operation for every type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../../jaxcomm/native/src/nccl/nccl_abi.h"

namespace jaxcomm {

inline constexpr int kDTypeCount = 10;
inline constexpr const char* kDTypeNames[kDTypeCount] = {
    "int8",   "uint8",   "int32",   "uint32",  "int64",
    "uint64", "float16", "float32", "float64", "bfloat16"};
inline constexpr size_t kDTypeBytes[kDTypeCount] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

// Stands for every operation that RedOpCreatePreMulSum has made.
inline constexpr int kPreMulSum = 5;
inline constexpr const char* kOpNames[] = {"sum", "prod", "max",
                                           "min", "avg",  "premulsum"};

template <typename To, typename From>
To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Float16 {
  uint16_t bits;

  operator float() const {
    const uint32_t sign = uint32_t{bits} >> 15 << 31, magnitude = bits & 0x7FFF;
    if (magnitude >= 0x7C00) return Bits<float>(sign | 0x7F800000 | magnitude << 13);
    if (magnitude >= 0x0400) return Bits<float>(sign | (magnitude + (112u << 10)) << 13);
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  static Float16 Of(float value) {
    const uint32_t b = Bits<uint32_t>(value), magnitude = b & 0x7FFFFFFF;
    const auto sign = static_cast<uint16_t>(b >> 16 & 0x8000);
    uint32_t half;
    if (magnitude > 0x7F800000) {
      half = 0x7E00;
    } else if (magnitude >= Bits<uint32_t>(65520.0f)) {
      half = 0x7C00;
    } else if (magnitude < Bits<uint32_t>(0x1p-14f)) {
      half = static_cast<uint32_t>(std::nearbyint(Bits<float>(magnitude) * 0x1p24f));
    } else {
      half = ((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112u << 10);
    }
    return {static_cast<uint16_t>(sign | half)};
  }
};

struct Bfloat16 {
  uint16_t bits;

  operator float() const { return Bits<float>(uint32_t{bits} << 16); }
  static Bfloat16 Of(float value) {
    const uint32_t b = Bits<uint32_t>(value);
    if ((b & 0x7FFFFFFF) > 0x7F800000) return {0x7FC0};
    return {static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16)};
  }
};

// 16-bit floats are reduced in float32, all others in their own type.
template <typename T>
using Wide = std::conditional_t<std::is_arithmetic_v<T>, T, float>;

template <typename T>
T Narrow(Wide<T> value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return value;
  } else {
    return T::Of(value);
  }
}

// Integers wrap around.
template <typename W, bool kProduct>
W Combine(W a, W b) {
  if constexpr (std::is_integral_v<W>) {
    const auto x = static_cast<uint64_t>(a), y = static_cast<uint64_t>(b);
    return static_cast<W>(kProduct ? x * y : x + y);
  } else {
    return kProduct ? a * b : a + b;
  }
}

// parts[p] are rank p's numbers, combined in the order of the ranks. `factors` are the
// ranks' PreMulSum factors, bits of a T each.
template <typename T>
void ReduceAs(int op, const std::vector<const char*>& parts,
              const std::vector<uint64_t>& factors, char* to, size_t count) {
  using W = Wide<T>;
  constexpr size_t kBlock = 512;
  const size_t ranks = parts.size();
  W sum[kBlock];
  T in[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t n = std::min(kBlock, count - start);
    for (size_t p = 0; p < ranks; ++p) {
      std::memcpy(in, parts[p] + start * sizeof(T), n * sizeof(T));
      const auto each = [&](auto f) {
        for (size_t i = 0; i < n; ++i) {
          const W x = in[i];
          sum[i] = p == 0 ? x : f(sum[i], x);
        }
      };
      switch (op) {
        case kNcclProd:
          each(Combine<W, true>);
          break;
        case kNcclMax:
          each([](W a, W b) {
            return b > a || std::isnan(static_cast<double>(b)) ? b : a;
          });
          break;
        case kNcclMin:
          each([](W a, W b) {
            return b < a || std::isnan(static_cast<double>(b)) ? b : a;
          });
          break;
        case kPreMulSum: {
          T factor;
          std::memcpy(&factor, &factors[p], sizeof factor);
          for (size_t i = 0; i < n; ++i) {
            const W x = Combine<W, true>(in[i], factor);
            sum[i] = p == 0 ? x : Combine<W, false>(sum[i], x);
          }
          break;
        }
        default:
          each(Combine<W, false>);
      }
    }
    for (size_t i = 0; i < n; ++i) {
      if (op == kNcclAvg) sum[i] = static_cast<W>(sum[i] / static_cast<W>(ranks));
      in[i] = Narrow<T>(sum[i]);
    }
    std::memcpy(to + start * sizeof(T), in, n * sizeof(T));
  }
}

inline void Reduce(int dtype, int op, const std::vector<const char*>& parts,
                   const std::vector<uint64_t>& factors, char* to, size_t count) {
  using Function = decltype(&ReduceAs<float>);
  static constexpr Function kFunctions[kDTypeCount] = {
      ReduceAs<int8_t>,  ReduceAs<uint8_t>,  ReduceAs<int32_t>, ReduceAs<uint32_t>,
      ReduceAs<int64_t>, ReduceAs<uint64_t>, ReduceAs<Float16>, ReduceAs<float>,
      ReduceAs<double>,  ReduceAs<Bfloat16>};
  kFunctions[dtype](op, parts, factors, to, count);
}

}  // namespace jaxcomm
