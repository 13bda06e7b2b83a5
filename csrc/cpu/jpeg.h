// What a call of the JPEG functions takes, in the order of the record in poisonshield/ops/jpeg/cpu_kernels.py.
#pragma once
#include <cstdint>

namespace poisonshield {

struct Pixels {
  void* data;          // [B, 3, H, W], float32 or, in exact mode, uint8
  int64_t strides[4];  // in elements
};

enum Rounding : int32_t { kNone = 0, kPoly = 1, kNearest = 2, kNearestPoly = 3 };  // forward; slope 1, 3 e^2, 1, 3 e^2

struct JpegCall {
  int64_t size;         // of this record, in bytes
  Pixels x;             // read
  Pixels out;           // written: the picture, or d loss/d x
  Pixels grad;          // d loss/d picture, read by the backward
  const float* tables;  // [B, 2, 8, 8]
  const float* affine;  // [2, 3]: pixel in 0..255 = x * affine[0] + affine[1]
  float* table_sums;    // [B, bands, 2, 8, 8], written by the backward: d loss/d tables of each band; or null
  int64_t batch, height, width;
  int64_t threads;  // at most
  int32_t bytes;    // whether x and out are uint8
  int32_t half;     // 4:2:0, chrominance at half the size; else 4:4:4
  int32_t smooth;   // whether chrominance is enlarged by the triangle filter; else copied
  int32_t exact;    // libjpeg's integers; else floats
  int32_t integer;  // whether every stored plane is rounded
  int32_t rounding;
  float clamp_grad;  // slope where a clamp cuts
};

// A band is a row of units: 16 rows of pixels in 4:2:0, 8 in 4:4:4. Chrominance has 8 rows in either.
struct Sizes {
  int64_t h, w;         // of the picture
  int64_t ch, cw;       // of chrominance
  int64_t rows;         // of pixels in a band
  int64_t bands;        // of the picture
  int64_t wide, cwide;  // w and cw, padded to whole units
  int64_t halo;         // 1 where a row of chrominance needs its neighbours in other bands
  bool half, smooth;

  explicit Sizes(const JpegCall& call)
      : h(call.height), w(call.width), half(call.half != 0), smooth(call.half && call.smooth) {
    rows = half ? 16 : 8;
    bands = (h + rows - 1) / rows;
    wide = (w + rows - 1) / rows * rows;
    ch = half ? (h + 1) / 2 : h;
    cw = half ? (w + 1) / 2 : w;
    cwide = half ? wide / 2 : wide;
    halo = smooth ? 1 : 0;
  }
};

// What one thread does at a time: bands first .. last-1 of one picture.
struct Stretch {
  int64_t sample, first, last;
};

}  // namespace poisonshield
