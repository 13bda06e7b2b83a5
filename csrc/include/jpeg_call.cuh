// What the kernels of JPEG are told, and how a picture is cut: a warp takes four blocks of 8x8 samples, a lane a row of
// one. 4:4:4: any four blocks, each in all three planes. 4:2:0: the four blocks of luminance of a unit of 16x16 pixels,
// with the two of chrominance on the first half of its lanes.
#pragma once
#include <stdint.h>

namespace poisonshield {

constexpr int kJpegThreads = 128;
constexpr int kJpegWarps = kJpegThreads / 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

enum Rounding : int32_t { kNone = 0, kPoly = 1, kNearest = 2, kNearestPoly = 3, kFourier = 4, kHard = 5 };

// A tensor [B, 3, H, W] of any strides, which count elements.
struct Image {
  void* data;
  int64_t strides[4];
};

struct JpegCall {
  Image x;                // read
  Image out;              // written: the picture, or d loss/d x
  Image grad;             // d loss/d picture
  const float* tables;    // [B, 2, 8, 8]
  const float* affine;    // [2, 3]: pixel in 0..255 = x * affine[0] + affine[1]
  void* planes;           // of 4:2:0, decoded and centred: see Planes
  float* sums;            // [B, chunks, 2, 8, 8]: d loss/d tables of each thread block, or null
  int64_t table_stride;   // from a sample's tables to the next: 128, or 0 where all share them
  int64_t batch;
  int32_t h, w;           // of the picture
  int32_t ch, cw;         // of 4:2:0's chrominance
  int32_t across;         // blocks in a row (4:4:4), or units (4:2:0)
  int32_t cells;          // blocks or units of a picture
  int32_t chunks;         // thread blocks of a picture
  int32_t rounding, terms;
  bool smooth;            // chrominance is enlarged by the triangle filter; else copied
  bool integer;           // every stored plane is rounded
  float clamp_grad;       // slope where a clamp cuts
};

// Where a thread stands.
struct Place {
  int64_t sample;
  int chunk, warp, lane, group, row;  // group: which of the warp's four blocks
  __device__ __forceinline__ explicit Place(const JpegCall& call)
      : sample(blockIdx.x / unsigned(call.chunks)), chunk(blockIdx.x % unsigned(call.chunks)), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32), group(lane / 8), row(lane % 8) {}
};

// A block of 4:4:4. Lanes beyond the last block repeat it, and write nothing.
struct Block {
  bool valid;
  int y, x;  // of the lane's row of eight pixels
  __device__ __forceinline__ Block(const JpegCall& call, const Place& at) {
    const int wanted = at.chunk * (kJpegThreads / 8) + at.warp * 4 + at.group;
    const int n = min(wanted, call.cells - 1);
    valid = wanted < call.cells;
    y = n / call.across * 8 + at.row;
    x = n % call.across * 8;
  }
};

// A unit of 4:2:0, and the lane's row of eight pixels in it.
struct Unit {
  bool valid;
  int top, left;   // of the unit, in pixels
  int y, x;        // of the lane's pixels
  int inside;      // rows of chrominance that are no padding, 1 to 8
  __device__ __forceinline__ Unit(const JpegCall& call, const Place& at) {
    const int wanted = at.chunk * kJpegWarps + at.warp, n = min(wanted, call.cells - 1);
    valid = wanted < call.cells;
    top = n / call.across * 16;
    left = n % call.across * 16;
    y = top + at.group / 2 * 8 + at.row;
    x = left + at.group % 2 * 8;
    inside = min(8, call.ch - top / 2);
  }
};

// The planes of 4:2:0 between kernels, padded to whole units: luminance of all samples [B, 16 rows, 16 columns], then
// chrominance [B, 2, 8 rows, 8 columns], for each row and column of units. S is what they are stored as.
template <class S>
struct Planes {
  S *luma, *chroma;
  int wide, chroma_size;  // elements of a row of luminance, and of one plane of chrominance
  __device__ __forceinline__ Planes(const JpegCall& call, int64_t sample) {
    S* start = static_cast<S*>(call.planes);
    luma = start + sample * call.cells * 256;
    chroma = start + (call.batch * 2 + sample) * call.cells * 128;
    wide = call.across * 16;
    chroma_size = call.cells * 64;
  }
  __device__ __forceinline__ S* luma_row(int y) const { return luma + int64_t(y) * wide; }
  __device__ __forceinline__ S* chroma_row(int plane, int y) const {
    return chroma + int64_t(plane) * chroma_size + int64_t(y) * (wide / 2);
  }
};

}  // namespace poisonshield
