// Elements of a thread, up to 128 bits at a time, of float32, half precision or bytes; arithmetic is in float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "launch.cuh"

namespace poisonshield {

template <class T>
constexpr int kEach = 16 / int(sizeof(T));  // elements of a thread

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

__device__ __forceinline__ float value(float v) { return v; }
__device__ __forceinline__ float value(uint8_t v) { return v; }
__device__ __forceinline__ float value(__half v) { return __half2float(v); }
__device__ __forceinline__ float value(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

__device__ __forceinline__ uint16_t bits_of(__half v) { return __half_as_ushort(v); }
__device__ __forceinline__ uint16_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ void from_bits(uint16_t bits, __half& to) { to = __ushort_as_half(bits); }
__device__ __forceinline__ void from_bits(uint16_t bits, __nv_bfloat16& to) { to = __ushort_as_bfloat16(bits); }

// The next number up or down; a magnitude's bit pattern counts upwards.
template <class T>
__device__ __forceinline__ T neighbour(T v, bool up) {
  const float wide = value(v);
  const uint16_t bits = bits_of(v);
  T next;
  from_bits(uint16_t(wide == 0.0f ? (up ? 1 : 0x8001) : (wide > 0.0f) == up ? bits + 1 : bits - 1), next);
  return next;
}

// v as T, to the nearest number, but never out of [low, high].
template <class T>
__device__ __forceinline__ T stored(float v, float low, float high) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    T near;
    narrow(v, near);
    if (value(near) > high) near = neighbour(near, false);
    if (value(near) < low) near = neighbour(near, true);
    return near;
  }
}

// Which elements of a run of `count` a thread takes. Wide: kEach<T> neighbours, all of them in the run or none; else such
// that the threads of a warp are neighbours.
template <class T, bool kWide>
struct Places {
  uint32_t first, count;

  __device__ __forceinline__ Places(uint32_t chunk, uint32_t count)
      : first(chunk * kThreads * kEach<T> + threadIdx.x * (kWide ? kEach<T> : 1)), count(count) {}
  __device__ __forceinline__ uint32_t operator[](int k) const { return first + k * (kWide ? 1 : kThreads); }
  __device__ __forceinline__ bool has(int k) const { return (*this)[kWide ? 0 : k] < count; }

  // The elements of the run that starts at p; others are left as they are.
  template <class To, class V>
  __device__ __forceinline__ void load(To (&to)[kEach<T>], const V* __restrict__ p) const {
    if constexpr (kWide) {
      constexpr int kPiece = kEach<T> * sizeof(V) > 16 ? 16 / sizeof(V) : kEach<T>;
      if (!has(0)) return;
#pragma unroll
      for (int k = 0; k < kEach<T>; k += kPiece) {
        const auto pack = *reinterpret_cast<const Pack<V, kPiece>*>(p + first + k);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) to[k + j] = To(value(pack.v[j]));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) {
        if (has(k)) to[k] = To(value(p[(*this)[k]]));
      }
    }
  }

  __device__ __forceinline__ void store(const T (&from)[kEach<T>], T* __restrict__ p) const {
    if constexpr (kWide) {
      if (!has(0)) return;
      Pack<T, kEach<T>> pack;
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) pack.v[k] = from[k];
      *reinterpret_cast<Pack<T, kEach<T>>*>(p + first) = pack;
    } else {
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) {
        if (has(k)) p[(*this)[k]] = from[k];
      }
    }
  }
};

}  // namespace poisonshield
