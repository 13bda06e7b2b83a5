// A block of 8x8 samples through the transform, the table and back, by eight lanes, each of which holds a row and,
// between the transpositions, a column. In floats (Smooth), and in libjpeg's integers (Exact), whose bits are fixed:
// there no product may be fused with a sum.
#pragma once
#include <stdint.h>

#include <type_traits>

#include "jpeg_call.cuh"

namespace poisonshield {
namespace transforms {
#define INLINE static __device__ __forceinline__
typedef float Floats;
typedef int32_t Ints;
#include "../cpu/transforms.h"
#undef INLINE
}  // namespace transforms

// Scratch of a warp, for transpositions: rows of 9 and blocks of 72 words keep lanes on banks of their own.
struct Scratch {
  int32_t words[4 * 72];
};

// A block's rows become its columns, and the other way round.
template <class V>
__device__ __forceinline__ void transpose(V (&v)[8], Scratch& scratch, const Place& at) {
  V* block = reinterpret_cast<V*>(scratch.words) + at.group * 72;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) block[at.row * 9 + i] = v[i];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = block[i * 9 + at.row];
}

template <class V>
__device__ __forceinline__ V clamped(V v, V low, V high) {  // a NaN stays
  v = v < low ? low : v;
  return v > high ? high : v;
}

// As a plane is stored: within [-128, 127].
template <class V>
__device__ __forceinline__ void clamp_all(V (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = clamped(v[i], V(-128), V(127));
}

// Samples of a plane that is stored in whole numbers are rounded half up.
__device__ __forceinline__ void store_all(float (&v)[8], bool integer) {
  if (!integer) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = floorf(v[i] + 0.5f);
}
__device__ __forceinline__ void store_all(int32_t (&)[8], bool) {}  // whole already

// The nearest whole number, halves away from zero.
__device__ __forceinline__ float nearest(float u) { return truncf(u + copysignf(0.5f, u)); }

// Rounding of coefficients, and its slope: see `jpeg` for the formulas. All threads take the same way.
__device__ __forceinline__ void round_all(float (&u)[8], const JpegCall& call) {
  if (call.rounding == kNone) return;
  if (call.rounding == kFourier) {
    float e[8], weight = 1.0f / 3.14159265358979f;
#pragma unroll
    for (int k = 0; k < 8; ++k) e[k] = u[k] - nearest(u[k]);
#pragma unroll 1
    for (int term = 1; term <= call.terms; ++term) {
#pragma unroll
      for (int k = 0; k < 8; ++k) u[k] -= weight / float(term) * sinpif(2.0f * float(term) * e[k]);
      weight = -weight;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float n = nearest(u[k]), e = u[k] - n;
    u[k] = call.rounding == kPoly ? n + e * e * e : n;
  }
}

__device__ __forceinline__ void slopes_of(const float (&u)[8], const JpegCall& call, float (&to)[8]) {
  const bool cubic = call.rounding == kPoly || call.rounding == kNearestPoly;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float e = u[k] - nearest(u[k]);
    to[k] = cubic ? 3.0f * e * e : (call.rounding == kHard ? 0.0f : 1.0f);
  }
  if (call.rounding != kFourier) return;
  float weight = 2.0f;
#pragma unroll 1
  for (int term = 1; term <= call.terms; ++term) {
#pragma unroll
    for (int k = 0; k < 8; ++k) to[k] -= weight * cospif(2.0f * float(term) * (u[k] - nearest(u[k])));
    weight = -weight;
  }
}

// One pass is sqrt(8) times the orthonormal transform, so that two are 8 times it; the tables take that out again.
struct Smooth {
  typedef float V;
  typedef float Stored;  // planes between kernels, not clamped
  struct Entry {         // of a table
    float into, back;    // 1 / (8 q), q / 8
  };
  static __device__ __forceinline__ Entry entry(float q) { return {1.0f / q * 0.125f, q * 0.125f}; }

  // A row of samples becomes a column of coefficients in units of the table.
  static __device__ __forceinline__ void encode(V (&v)[8], const Entry* table, Scratch& scratch, const Place& at) {
    transforms::forward_pass<transforms::FloatRules>(v);
    transpose(v, scratch, at);
    transforms::forward_pass<transforms::FloatRules>(v);
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] *= table[k * 8 + at.row].into;
  }

  // And back, not clamped.
  static __device__ __forceinline__ void decode(
      V (&v)[8], const Entry* table, Scratch& scratch, const Place& at, const JpegCall& call) {
    round_all(v, call);
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] *= table[k * 8 + at.row].back;
    inverse(v, scratch, at);
  }

  static __device__ __forceinline__ void inverse(V (&v)[8], Scratch& scratch, const Place& at) {
    transforms::inverse_pass<transforms::FloatRules>(v);
    transpose(v, scratch, at);
    transforms::inverse_pass<transforms::FloatRules>(v);
  }
};

struct Exact {
  typedef int32_t V;
  typedef int8_t Stored;  // planes between kernels, clamped
  struct Entry {
    int32_t q;
    float inverse;  // 1 / (8 q)
  };
  static __device__ __forceinline__ Entry entry(float q) { return {int32_t(q), __frcp_rn(8.0f * q)}; }

  // A row of samples becomes a column of whole coefficients.
  static __device__ __forceinline__ void encode(V (&v)[8], const Entry* table, Scratch& scratch, const Place& at) {
    transforms::forward_pass<transforms::IntRules<11>>(v);
    transpose(v, scratch, at);
    transforms::forward_pass<transforms::IntRules<15>>(v);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      // floor((n + 0.5) * (1 / 8q)) in float32 is n / 8q for every n below 32768: all that can come.
      const Entry t = table[k * 8 + at.row];
      const int32_t n = (v[k] < 0 ? -v[k] : v[k]) + 4 * t.q;
      const int32_t size = int32_t(__fmul_rn(float(n) + 0.5f, t.inverse));
      v[k] = v[k] < 0 ? -size : size;
    }
  }

  static __device__ __forceinline__ void decode(
      V (&v)[8], const Entry* table, Scratch& scratch, const Place& at, const JpegCall&) {
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] *= table[k * 8 + at.row].q;
    transforms::inverse_pass<transforms::IntRules<11>>(v);
    transpose(v, scratch, at);
    transforms::inverse_pass<transforms::IntRules<18>>(v);
    clamp_all(v);
  }
};

// What a thread block shares: the map from x to 0..255, a sample's tables, and the scratch of its warps.
struct Space {
  float scale[3], shift[3], inverse[3];
  __device__ __forceinline__ void fill(const float* affine) {
    const int i = threadIdx.x;
    if (i >= 3) return;
    scale[i] = affine[i];
    shift[i] = affine[3 + i];
    inverse[i] = 1.0f / scale[i];
  }
};

template <class R>
struct Shared {
  Space space;
  typename R::Entry tables[2][64];
  Scratch scratch[kJpegWarps];

  __device__ __forceinline__ void fill(const JpegCall& call, const Place& at) {
    space.fill(call.affine);
    const int i = threadIdx.x;
    tables[i / 64][i % 64] = R::entry(call.tables[at.sample * call.table_stride + i]);
    __syncthreads();
  }
};

}  // namespace poisonshield
