// From the numbers of a tensor to Y, Cb and Cr, and back. In floats planes are centred on 0; in libjpeg's integers they
// are too once they leave `to_planes`, but for chrominance that is still to be averaged.
#pragma once
#include <stdint.h>

#include "jpeg_blocks.cuh"

namespace poisonshield {

constexpr float kRedCr = 1.402f, kBlueCb = 1.772f;
constexpr float kGreenCb = float(-0.114 * 1.772 / 0.587), kGreenCr = float(-0.299 * 1.402 / 0.587);
constexpr float kCbRed = float(-0.299 / 1.772), kCbGreen = float(-0.587 / 1.772);
constexpr float kCrGreen = float(-0.587 / 1.402), kCrBlue = float(-0.114 / 1.402);

__device__ __forceinline__ void to_range(const Space& space, float (&rgb)[3][8]) {
#pragma unroll
  for (int c = 0; c < 3; ++c) {
#pragma unroll
    for (int i = 0; i < 8; ++i) rgb[c][i] = __fadd_rn(__fmul_rn(rgb[c][i], space.scale[c]), space.shift[c]);
  }
}

__device__ __forceinline__ void to_planes(const float (&rgb)[3][8], bool integer, float (&planes)[3][8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float r = rgb[0][i], g = rgb[1][i], b = rgb[2][i];
    planes[0][i] = 0.299f * r + 0.587f * g + (0.114f * b - 128.0f);
    planes[1][i] = kCbRed * r + kCbGreen * g + 0.5f * b;
    planes[2][i] = 0.5f * r + kCrGreen * g + kCrBlue * b;
  }
#pragma unroll
  for (int p = 0; p < 3; ++p) store_all(planes[p], integer);
}

// 0..255, rounded half up; NaN becomes 0.
__device__ __forceinline__ int32_t level(float v) {
  v = __fadd_rn(v, 0.5f);
  return int32_t(v > 0.0f ? (v < 255.0f ? v : 255.0f) : 0.0f);
}

// Chrominance in 0..255.
__device__ __forceinline__ void to_planes(const float (&rgb)[3][8], bool, int32_t (&planes)[3][8]) {
  constexpr int32_t kCentre = (128 << 16) + 32767;  // 32767, not 32768, in libjpeg
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int32_t r = level(rgb[0][i]), g = level(rgb[1][i]), b = level(rgb[2][i]);
    planes[0][i] = ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16) - 128;
    planes[1][i] = (-11059 * r - 21709 * g + 32768 * b + kCentre) >> 16;
    planes[2][i] = (32768 * r - 27439 * g - 5329 * b + kCentre) >> 16;
  }
}

// The mean of 2x2 samples, whose sum is given, in an even or odd column of chrominance; `store_all` is for later.
__device__ __forceinline__ float averaged(float sum, int) { return sum * 0.25f; }
__device__ __forceinline__ int32_t averaged(int32_t sum, int column) { return ((sum + 1 + column % 2) >> 2) - 128; }

// Where nothing is averaged.
__device__ __forceinline__ float centred(float v) { return v; }
__device__ __forceinline__ int32_t centred(int32_t v) { return v - 128; }

// Red, green and blue in 0..255, not clamped.
__device__ __forceinline__ void to_colours(float y, float cb, float cr, float (&rgb)[3]) {
  y += 128.0f;
  rgb[0] = y + kRedCr * cr;
  rgb[1] = y + kGreenCb * cb + kGreenCr * cr;
  rgb[2] = y + kBlueCb * cb;
}

__device__ __forceinline__ void to_colours(int32_t y, int32_t cb, int32_t cr, int32_t (&rgb)[3]) {
  y += 128;
  rgb[0] = y + ((91881 * cr + 32768) >> 16);
  rgb[1] = y + ((-22554 * cb - 46802 * cr + 32768) >> 16);
  rgb[2] = y + ((116130 * cb + 32768) >> 16);
}

// From 0..255 to the space of x.
__device__ __forceinline__ float from_range(float v, const Space& space, int c) {
  return (v - space.shift[c]) * space.inverse[c];
}

__device__ __forceinline__ float from_range(int32_t v, const Space& space, int c) {
  return __fdiv_rn(__fsub_rn(float(v), space.shift[c]), space.scale[c]);
}

// Eight pixels of the result from their planes.
template <class V>
__device__ __forceinline__ void to_result(
    const V (&planes)[3][8], const Space& space, bool integer, float (&out)[3][8]) {
  V rgb[3][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    V colour[3];
    to_colours(planes[0][i], planes[1][i], planes[2][i], colour);
#pragma unroll
    for (int c = 0; c < 3; ++c) rgb[c][i] = clamped(colour[c], V(0), V(255));
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    store_all(rgb[c], integer);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[c][i] = from_range(rgb[c][i], space, c);
  }
}

// Decoded samples as they are stored in the picture.
__device__ __forceinline__ void to_plane(float (&v)[8], bool integer) {
  clamp_all(v);
  store_all(v, integer);
}
__device__ __forceinline__ void to_plane(int32_t (&)[8], bool) {}  // clamped already

}  // namespace poisonshield
