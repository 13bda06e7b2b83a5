// What the kernels of 4:2:0 share: a unit's luminance and averaged chrominance from its pixels, and chrominance at
// twice its size.
#pragma once
#include "jpeg_colours.cuh"
#include "jpeg_pixels.cuh"

namespace poisonshield {

// Two planes of 8x8 samples of a unit.
template <class V>
struct ChromaTile {
  V at[2][8][9];
};

// The lane's row of luminance, and, on the groups 0 and 1, its row of Cb or Cr; 2 and 3 have the same once more.
template <class R, class T>
__device__ __forceinline__ void split_unit(
    const JpegCall& call, const Shared<R>& shared, ChromaTile<typename R::V>& tile, const Place& at, const Unit& unit,
    typename R::V (&luma)[8], typename R::V (&chroma)[8]) {
  typename R::V planes[3][8];
  {
    float rgb[3][8];
    load_pixels<T>(call.x, at.sample, min(unit.y, call.h - 1), unit.x, call.w, rgb);
    to_range(shared.space, rgb);
    to_planes(rgb, call.integer, planes);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) luma[i] = planes[0][i];
  __syncwarp();
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      typename R::V sum = planes[1 + p][2 * i] + planes[1 + p][2 * i + 1];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      if (at.row % 2 == 0) tile.at[p][(unit.y - unit.top) / 2][at.group % 2 * 4 + i] = averaged(sum, i);
    }
  }
  __syncwarp();
  const int row = min(at.row, unit.inside - 1);  // below the picture: its last averaged row
#pragma unroll
  for (int i = 0; i < 8; ++i) chroma[i] = tile.at[at.group % 2][row][i];
  store_all(chroma, call.integer);
}

__device__ __forceinline__ float mixed_rows(float near, float far) { return 0.75f * near + 0.25f * far; }
__device__ __forceinline__ int32_t mixed_rows(int32_t near, int32_t far) { return 3 * near + far; }

__device__ __forceinline__ float mixed_columns(float near, float far, int) { return 0.75f * near + 0.25f * far; }
__device__ __forceinline__ int32_t mixed_columns(int32_t near, int32_t far, int odd) {
  return (3 * near + far + 8 - odd) >> 4;
}

// Which row or column of chrominance a pixel takes a quarter of: that on its side, or the last one.
__device__ __forceinline__ int far_of(int pixel, int count) {
  return clamped(pixel / 2 + (pixel % 2 ? 1 : -1), 0, count - 1);
}

// Six samples of a row of chrominance from column `start` - 1, those beyond the picture as its last one. start is a
// multiple of four, so that four of them are one word.
template <class S, class V>
__device__ __forceinline__ void six_samples(const JpegCall& call, const S* row, int start, V (&to)[8]) {
  struct alignas(4 * sizeof(S)) Four {
    S v[4];
  };
  const Four four = *reinterpret_cast<const Four*>(row + start);
  const int last = call.cw - 1;
  to[0] = V(row[max(start - 1, 0)]);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[1 + i] = i > 0 && start + i > last ? to[i] : V(four.v[i]);
  to[5] = to[6] = to[7] = V(row[min(start + 4, last)]);
  to_plane(to, call.integer);
}

// Cb or Cr of eight pixels, row y, from column x, which is a multiple of eight.
template <class R>
__device__ __forceinline__ void enlarged(
    const JpegCall& call, const Planes<typename R::Stored>& planes, int plane, int y, int x, typename R::V (&to)[8]) {
  typename R::V near[8];
  six_samples(call, planes.chroma_row(plane, y / 2), x / 2, near);
  if (!call.smooth) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = near[i / 2 + 1];
    return;
  }
  typename R::V far[8];
  six_samples(call, planes.chroma_row(plane, far_of(y, call.ch)), x / 2, far);
#pragma unroll
  for (int i = 0; i < 6; ++i) near[i] = mixed_rows(near[i], far[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = mixed_columns(near[i + 1], near[i], 0);
    to[2 * i + 1] = mixed_columns(near[i + 1], near[i + 2], 1);
  }
  store_all(to, call.integer);
}

}  // namespace poisonshield
