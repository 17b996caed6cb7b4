// Built several times with different target flags (see CMakeLists.txt); JAXCOMM_TARGET
// names the table. Uses no function of a standard header: an inline one could be
// emitted here for a processor that another file's caller does not have.
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>  // intrinsics are inlined whatever the target
#endif

namespace jaxcomm {
namespace {

template <typename To, typename From>
inline To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// bfloat16: the upper half of a float32.
struct BF16 {
  static constexpr uint32_t kInf = 0x7F80, kNaN = 0x7FC0;
  static inline float ToFloat(uint16_t h) { return Bits<float>(uint32_t{h} << 16); }
  static inline uint16_t FromFloat(float f) {
    const uint32_t b = Bits<uint32_t>(f);
    const uint32_t nearest_even = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    const bool nan = (b & 0x7FFFFFFF) > 0x7F800000;
    return static_cast<uint16_t>(nan ? kNaN : nearest_even);
  }
};

// IEEE binary16. Written without branches and without subnormal float32 operands, so
// that it vectorises and does not depend on a thread's flush-to-zero mode.
struct F16 {
  static constexpr uint32_t kInf = 0x7C00, kNaN = 0x7E00;
  static inline float ToFloat(uint16_t h) {
    const uint32_t sign = (uint32_t{h} & 0x8000) << 16;
    const uint32_t magnitude = uint32_t{h} & 0x7FFF;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7F800000;
    const uint32_t tiny =
        Bits<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    uint32_t b = magnitude < 0x0400 ? tiny : normal;
    b = magnitude >= kInf ? special : b;
    return Bits<float>(b | sign);
  }
  static inline uint16_t FromFloat(float f) {
    const uint32_t b = Bits<uint32_t>(f);
    const uint32_t sign = (b >> 16) & 0x8000;
    const uint32_t magnitude = b & 0x7FFFFFFF;
    const uint32_t shifted = magnitude - (112u << 23);
    const uint32_t normal = (shifted + 0xFFF + ((shifted >> 13) & 1)) >> 13;
    // One unit in the last place of 0.5 is binary16's smallest subnormal.
    const uint32_t tiny = Bits<uint32_t>(Bits<float>(magnitude) + 0.5f) - 0x3F000000;
    uint32_t h = magnitude < 0x38800000 ? tiny : normal;
    h = magnitude >= 0x47800000 ? kInf : h;
    h = magnitude > 0x7F800000 ? kNaN : h;
    return static_cast<uint16_t>(h | sign);
  }
};

struct Add {
  static inline float Of(float a, float b) { return a + b; }
};
struct HalfSum {
  static inline float Of(float a, float b) { return (a + b) * 0.5f; }
};
struct Multiply {
  static inline float Of(float a, float b) { return a * b; }
};

template <typename Half, typename F>
void CombineHalf(const void* in, void* inout, int64_t n) {
  const uint16_t* __restrict a = static_cast<const uint16_t*>(in);
  uint16_t* __restrict b = static_cast<uint16_t*>(inout);
  for (int64_t i = 0; i < n; ++i) {
    b[i] = Half::FromFloat(F::Of(Half::ToFloat(a[i]), Half::ToFloat(b[i])));
  }
}

// Minimum or maximum of IEEE numbers by their bits: -0 < +0 and NaN wins, so that the
// result does not depend on which operand comes first.
template <typename U, typename S, U kInf, U kNaN, bool kLess>
void Extreme(const void* in, void* inout, int64_t n) {
  constexpr S kMagnitude = static_cast<S>(static_cast<U>(~U{0}) >> 1);
  constexpr int kTop = 8 * static_cast<int>(sizeof(U)) - 1;
  const S* __restrict a = static_cast<const S*>(in);
  S* __restrict b = static_cast<S*>(inout);
  for (int64_t i = 0; i < n; ++i) {
    const S x = a[i], y = b[i];
    const S key_x = static_cast<S>(x ^ ((x >> kTop) & kMagnitude));
    const S key_y = static_cast<S>(y ^ ((y >> kTop) & kMagnitude));
    const bool first = kLess ? key_x < key_y : key_x > key_y;
    const bool nan = ((x & kMagnitude) > static_cast<S>(kInf)) |
                     ((y & kMagnitude) > static_cast<S>(kInf));
    const S chosen = first ? x : y;
    b[i] = nan ? static_cast<S>(kNaN) : chosen;
  }
}

template <typename T>
void MeanOfTwo(const void* in, void* inout, int64_t n) {
  const T* __restrict a = static_cast<const T*>(in);
  T* __restrict b = static_cast<T*>(inout);
  for (int64_t i = 0; i < n; ++i) b[i] = (a[i] + b[i]) * T(0.5);
}

template <typename T>
inline constexpr bool kFloat = T(0.5) != T(0);

// Multiplying by 1/n is exact when n is a power of two and many times faster than
// dividing; otherwise divide, so that the result is always sum / n correctly rounded.
template <typename T>
void Divide(void* data, int64_t n, int divisor) {
  T* x = static_cast<T*>(data);
  if constexpr (kFloat<T>) {
    if ((divisor & (divisor - 1)) == 0) {
      const T factor = T(1) / static_cast<T>(divisor);
      for (int64_t i = 0; i < n; ++i) x[i] *= factor;
      return;
    }
  }
  const T d = static_cast<T>(divisor);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(x[i] / d);
}

template <typename T>
void DivideCopy(const void* from, void* to, int64_t n, int divisor) {
  const T* __restrict x = static_cast<const T*>(from);
  T* __restrict y = static_cast<T*>(to);
  if constexpr (kFloat<T>) {
    if ((divisor & (divisor - 1)) == 0) {
      const T factor = T(1) / static_cast<T>(divisor);
      for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
      return;
    }
  }
  const T d = static_cast<T>(divisor);
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i] / d);
}

// 8-bit means: 128 or more ranks do not fit the type, but the quotient does.
template <typename T>
void DivideWide(void* data, int64_t n, int divisor) {
  T* x = static_cast<T*>(data);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(x[i] / divisor);
}

template <typename T>
void DivideWideCopy(const void* from, void* to, int64_t n, int divisor) {
  const T* __restrict x = static_cast<const T*>(from);
  T* __restrict y = static_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i] / divisor);
}

template <typename T>
void DivideComplex(void* data, int64_t n, int divisor) {
  Divide<T>(data, 2 * n, divisor);
}

template <typename T>
void DivideComplexCopy(const void* from, void* to, int64_t n, int divisor) {
  DivideCopy<T>(from, to, 2 * n, divisor);
}

template <typename Half>
void DivideHalf(void* data, int64_t n, int divisor) {
  uint16_t* x = static_cast<uint16_t*>(data);
  const float d = static_cast<float>(divisor);
  for (int64_t i = 0; i < n; ++i) x[i] = Half::FromFloat(Half::ToFloat(x[i]) / d);
}

template <typename Half>
void DivideHalfCopy(const void* from, void* to, int64_t n, int divisor) {
  const uint16_t* __restrict x = static_cast<const uint16_t*>(from);
  uint16_t* __restrict y = static_cast<uint16_t*>(to);
  const float d = static_cast<float>(divisor);
  for (int64_t i = 0; i < n; ++i) y[i] = Half::FromFloat(Half::ToFloat(x[i]) / d);
}

template <typename Half>
void ScaleHalf(void* data, int64_t n, float factor) {
  uint16_t* x = static_cast<uint16_t*>(data);
  for (int64_t i = 0; i < n; ++i) x[i] = Half::FromFloat(Half::ToFloat(x[i]) * factor);
}

template <typename Half>
void Encode(const float* from, void* to, int64_t n, float factor) {
  const float* __restrict x = from;
  uint16_t* __restrict y = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) y[i] = Half::FromFloat(x[i] * factor);
}

template <typename Half>
void Decode(const void* from, float* to, int64_t n, float factor, int divisor) {
  const uint16_t* __restrict x = static_cast<const uint16_t*>(from);
  float* __restrict y = to;
  if ((divisor & (divisor - 1)) == 0) {
    const float both = factor / static_cast<float>(divisor);
    for (int64_t i = 0; i < n; ++i) y[i] = Half::ToFloat(x[i]) * both;
    return;
  }
  const float d = static_cast<float>(divisor);
  for (int64_t i = 0; i < n; ++i) y[i] = Half::ToFloat(x[i]) * factor / d;
}

template <typename Half, typename F>
void Accumulate(const void* from, float* acc, int64_t n, float factor) {
  const uint16_t* __restrict x = static_cast<const uint16_t*>(from);
  float* __restrict y = acc;
  for (int64_t i = 0; i < n; ++i) y[i] = F::Of(Half::ToFloat(x[i]) * factor, y[i]);
}

void Stream(void* to, const void* from, int64_t bytes) {
  char* __restrict y = static_cast<char*>(to);
  const char* __restrict x = static_cast<const char*>(from);
#ifdef __x86_64__
  // A whole cache line at a time, from the first one on.
  const int64_t ahead = -reinterpret_cast<int64_t>(y) & 63;
  const int64_t head = ahead < bytes ? ahead : bytes;
  __builtin_memcpy(y, x, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y + i), _mm512_loadu_si512(x + i));
#else
    for (int64_t j = i; j < i + 64; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(y + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j)));
    }
#endif
  }
  __builtin_memcpy(y + i, x + i, static_cast<size_t>(bytes - i));
#else
  __builtin_memcpy(y, x, static_cast<size_t>(bytes));
#endif
}

// inout[i] = op(in[i], inout[i]) of plain numbers. Integers wrap around; they are
// combined unsigned, where that is defined.
template <typename T, int kOp>
void CombineNumber(const void* in, void* inout, int64_t n) {
  const T* __restrict a = static_cast<const T*>(in);
  T* __restrict b = static_cast<T*>(inout);
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kOp == kSum) {
      b[i] = static_cast<T>(a[i] + b[i]);
    } else if constexpr (kOp == kProd) {
      // 1u: two uint16_t would be multiplied as int, and overflow.
      b[i] = static_cast<T>(1u * a[i] * b[i]);
    } else if constexpr (kOp == kMin) {
      b[i] = a[i] < b[i] ? a[i] : b[i];
    } else {
      b[i] = a[i] > b[i] ? a[i] : b[i];
    }
  }
}

template <typename T>
void SumComplex(const void* in, void* inout, int64_t n) {
  CombineNumber<T, kSum>(in, inout, 2 * n);
}

template <typename T>
void ProductComplex(const void* in, void* inout, int64_t n) {
  const T* __restrict a = static_cast<const T*>(in);
  T* __restrict b = static_cast<T*>(inout);
  for (int64_t i = 0; i < 2 * n; i += 2) {
    const T real = a[i] * b[i] - a[i + 1] * b[i + 1];
    const T imaginary = a[i] * b[i + 1] + a[i + 1] * b[i];
    b[i] = real;
    b[i + 1] = imaginary;
  }
}

template <typename Half, int kType>
void FillHalf(Kernels* k) {
  k->combine[kType][kSum] = CombineHalf<Half, Add>;
  k->combine[kType][kProd] = CombineHalf<Half, Multiply>;
  k->combine[kType][kMeanOfTwo] = CombineHalf<Half, HalfSum>;
  k->combine[kType][kMin] = Extreme<uint16_t, int16_t, Half::kInf, Half::kNaN, true>;
  k->combine[kType][kMax] = Extreme<uint16_t, int16_t, Half::kInf, Half::kNaN, false>;
  k->divide[kType] = DivideHalf<Half>;
  k->divide_copy[kType] = DivideHalfCopy<Half>;
  k->scale[kType] = ScaleHalf<Half>;
  k->encode[kType] = Encode<Half>;
  k->decode[kType] = Decode<Half>;
  k->accumulate[kType][kSum] = Accumulate<Half, Add>;
  k->accumulate[kType][kProd] = Accumulate<Half, Multiply>;
}

template <typename T, typename Unsigned, int kType>
void FillNumber(Kernels* k) {
  k->combine[kType][kSum] = CombineNumber<Unsigned, kSum>;
  k->combine[kType][kProd] = CombineNumber<Unsigned, kProd>;
  k->combine[kType][kMin] = CombineNumber<T, kMin>;
  k->combine[kType][kMax] = CombineNumber<T, kMax>;
  if constexpr (sizeof(T) < 4) {
    k->divide[kType] = DivideWide<T>;
    k->divide_copy[kType] = DivideWideCopy<T>;
  } else {
    k->divide[kType] = Divide<T>;
    k->divide_copy[kType] = DivideCopy<T>;
  }
}

}  // namespace

#define JAXCOMM_CONCAT_(a, b) a##b
#define JAXCOMM_CONCAT(a, b) JAXCOMM_CONCAT_(a, b)
#define JAXCOMM_STRING_(a) #a
#define JAXCOMM_STRING(a) JAXCOMM_STRING_(a)

Kernels JAXCOMM_CONCAT(Kernels_, JAXCOMM_TARGET)() {
  Kernels k = {};
  k.name = JAXCOMM_STRING(JAXCOMM_TARGET);
  FillNumber<float, float, kF32>(&k);
  FillNumber<double, double, kF64>(&k);
  FillNumber<int8_t, uint8_t, kI8>(&k);
  FillNumber<int16_t, uint16_t, kI16>(&k);
  FillNumber<int32_t, uint32_t, kI32>(&k);
  FillNumber<int64_t, uint64_t, kI64>(&k);
  FillNumber<uint8_t, uint8_t, kU8>(&k);
  FillNumber<uint16_t, uint16_t, kU16>(&k);
  FillNumber<uint32_t, uint32_t, kU32>(&k);
  FillNumber<uint64_t, uint64_t, kU64>(&k);
  // Of booleans: all and any.
  k.combine[kBool][kMin] = CombineNumber<uint8_t, kMin>;
  k.combine[kBool][kMax] = CombineNumber<uint8_t, kMax>;
  k.combine[kC64][kSum] = SumComplex<float>;
  k.combine[kC128][kSum] = SumComplex<double>;
  k.combine[kC64][kProd] = ProductComplex<float>;
  k.combine[kC128][kProd] = ProductComplex<double>;
  k.divide[kC64] = DivideComplex<float>;
  k.divide[kC128] = DivideComplex<double>;
  k.divide_copy[kC64] = DivideComplexCopy<float>;
  k.divide_copy[kC128] = DivideComplexCopy<double>;
  FillHalf<BF16, kBF16>(&k);
  FillHalf<F16, kF16>(&k);
  constexpr uint32_t kInf32 = 0x7F800000, kNaN32 = 0x7FC00000;
  constexpr uint64_t kInf64 = 0x7FF0000000000000, kNaN64 = 0x7FF8000000000000;
  k.combine[kF32][kMin] = Extreme<uint32_t, int32_t, kInf32, kNaN32, true>;
  k.combine[kF32][kMax] = Extreme<uint32_t, int32_t, kInf32, kNaN32, false>;
  k.combine[kF64][kMin] = Extreme<uint64_t, int64_t, kInf64, kNaN64, true>;
  k.combine[kF64][kMax] = Extreme<uint64_t, int64_t, kInf64, kNaN64, false>;
  k.stream = Stream;
  k.combine[kF32][kMeanOfTwo] = MeanOfTwo<float>;
  k.combine[kF64][kMeanOfTwo] = MeanOfTwo<double>;
  return k;
}

}  // namespace jaxcomm
