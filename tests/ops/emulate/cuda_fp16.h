// CUDA's half: conversions alone, to the nearest number, ties to even. Needs GCC 12 or clang 15 for _Float16.
#pragma once
#include <bit>
#include <stdint.h>

struct alignas(2) __half {
  uint16_t bits;
};
inline float __half2float(__half v) { return float(std::bit_cast<_Float16>(v.bits)); }
inline __half __float2half_rn(float v) { return {std::bit_cast<uint16_t>(_Float16(v))}; }
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half __ushort_as_half(uint16_t v) { return {v}; }
inline uint16_t __half_as_ushort(__half v) { return v.bits; }
