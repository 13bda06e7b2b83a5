// The kernel with which both directions of 4:2:0 begin: from a picture to its decoded planes, which both then enlarge.
#pragma once
#include "jpeg_half.cuh"
#include "jpeg_pixels.cuh"

namespace poisonshield {
namespace {

template <class S, class V>
__device__ __forceinline__ void save_row(const V (&v)[8], S* to) {
  S row[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) row[i] = S(v[i]);
  store_words(row, to);
}

template <class R, class T>
__global__ void __launch_bounds__(kJpegThreads) decode_units(JpegCall call) {
  __shared__ Shared<R> shared;
  __shared__ ChromaTile<typename R::V> tiles[kJpegWarps];
  const Place at(call);
  const Unit unit(call, at);
  shared.fill(call, at);
  typename R::V luma[8], chroma[8];
  split_unit<R, T>(call, shared, tiles[at.warp], at, unit, luma, chroma);
  R::encode(chroma, shared.tables[1], shared.scratch[at.warp], at);
  R::decode(chroma, shared.tables[1], shared.scratch[at.warp], at, call);
  R::encode(luma, shared.tables[0], shared.scratch[at.warp], at);
  R::decode(luma, shared.tables[0], shared.scratch[at.warp], at, call);
  if (!unit.valid) return;
  const Planes<typename R::Stored> planes(call, at.sample);
  save_row(luma, planes.luma_row(unit.y) + unit.x);
  if (at.group < 2) save_row(chroma, planes.chroma_row(at.group, unit.top / 2 + at.row) + unit.left / 2);
}

}  // namespace
}  // namespace poisonshield
