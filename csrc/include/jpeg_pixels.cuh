// Rows of eight pixels between tensors of any layout and registers: 128 bits at a time where they lie so.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "jpeg_call.cuh"

namespace poisonshield {

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widened(uint8_t v) { return float(v); }
__device__ __forceinline__ float widened(int8_t v) { return float(v); }

__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, uint8_t& to) { to = uint8_t(v); }

// What one instruction moves: 16 bytes, or 8 of 8-bit numbers.
template <class T>
struct Word {
  typedef uint4 Type;
};
template <>
struct Word<uint8_t> {
  typedef uint2 Type;
};
template <>
struct Word<int8_t> {
  typedef uint2 Type;
};

template <class T, int kCount>
__device__ __forceinline__ void load_words(const T* from, T (&to)[kCount]) {
  typedef typename Word<T>::Type W;
  constexpr int kEach = sizeof(W) / sizeof(T);
#pragma unroll
  for (int i = 0; i < kCount / kEach; ++i) {
    const W word = reinterpret_cast<const W*>(from)[i];
    memcpy(to + i * kEach, &word, sizeof word);
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_words(const T (&from)[kCount], T* to) {
  typedef typename Word<T>::Type W;
  constexpr int kEach = sizeof(W) / sizeof(T);
#pragma unroll
  for (int i = 0; i < kCount / kEach; ++i) {
    W word;
    memcpy(&word, from + i * kEach, sizeof word);
    reinterpret_cast<W*>(to)[i] = word;
  }
}

// How eight pixels of a row lie: each channel in whole words, all three together in whole words, or anyhow.
enum class Layout { kPlanar, kChannelsLast, kStrided };

template <class T>
__device__ __forceinline__ Layout layout_of(const Image& image, const T* row, int x, int w) {
  constexpr uintptr_t kWord = sizeof(typename Word<T>::Type);
  const int64_t* s = image.strides;
  if (x + 8 > w) return Layout::kStrided;
  if (s[3] == 1) {
    const uintptr_t places = reinterpret_cast<uintptr_t>(row + x) | uintptr_t(s[1] * int64_t(sizeof(T)));
    if (places % kWord == 0) return Layout::kPlanar;
  }
  if (s[1] == 1 && s[3] == 3 && reinterpret_cast<uintptr_t>(row + 3 * x) % kWord == 0) return Layout::kChannelsLast;
  return Layout::kStrided;
}

// Eight pixels of row y from column x, those beyond the width w as the last one.
template <class T>
__device__ __forceinline__ void load_pixels(
    const Image& image, int64_t sample, int y, int x, int w, float (&to)[3][8]) {
  const int64_t* s = image.strides;
  const T* row = static_cast<const T*>(image.data) + sample * s[0] + y * s[2];
  const Layout layout = layout_of(image, row, x, w);
  if (layout == Layout::kPlanar) {
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      T v[8];
      load_words(row + c * s[1] + x, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) to[c][i] = widened(v[i]);
    }
  } else if (layout == Layout::kChannelsLast) {
    T v[24];
    load_words(row + 3 * x, v);
#pragma unroll
    for (int i = 0; i < 24; ++i) to[i % 3][i / 3] = widened(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t column = min(x + i, w - 1) * s[3];
#pragma unroll
      for (int c = 0; c < 3; ++c) to[c][i] = widened(row[c * s[1] + column]);
    }
  }
}

// Writes those of eight pixels that lie inside the width w.
template <class T>
__device__ __forceinline__ void store_pixels(
    const Image& image, int64_t sample, int y, int x, int w, const float (&from)[3][8]) {
  const int64_t* s = image.strides;
  T* row = static_cast<T*>(image.data) + sample * s[0] + y * s[2];
  const Layout layout = layout_of(image, row, x, w);
  if (layout == Layout::kPlanar) {
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      T v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) narrow(from[c][i], v[i]);
      store_words(v, row + c * s[1] + x);
    }
  } else if (layout == Layout::kChannelsLast) {
    T v[24];
#pragma unroll
    for (int i = 0; i < 24; ++i) narrow(from[i % 3][i / 3], v[i]);
    store_words(v, row + 3 * x);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (x + i >= w) break;
#pragma unroll
      for (int c = 0; c < 3; ++c) narrow(from[c][i], row[c * s[1] + (x + i) * s[3]]);
    }
  }
}

}  // namespace poisonshield
