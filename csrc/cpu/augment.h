// What a call of the view's functions takes, in the order of the records in poisonshield/ops/augment/cpu_kernels.py, and
// what its kernels are told of a view.
#pragma once
#include <cstdint>
#include <vector>

namespace poisonshield {

enum Change : int64_t { kBrightness = 0, kContrast = 1, kSaturation = 2, kHue = 3, kNothing = 4 };

struct AugmentCall {
  int64_t size;          // of this record, in bytes
  const void* x;         // [B, 3, H, W], float32 in [0, 1] or uint8 levels, rows of a plane or of pixels
  int64_t strides[4];    // of x, in elements
  float* out;            // [B, S, S, 3]
  const float* boxes;    // [B, 4] top, left, height, width
  const uint8_t* flip;   // [B], or null
  const float* factors;  // [B, 4] by Change; or null
  const int64_t* order;  // [B, 4] of Change
  const uint8_t* gray;   // [B], or null
  const float* sigma;    // [B], or null
  int64_t batch, height, width;
  int64_t grid_height, grid_width;  // to which a whole box would be resized; its middle side x side is the view
  int64_t side;                     // S
  int64_t kernel;                   // pixels to which the blur is cut, or 0
  int64_t threads;                  // at most
  int32_t bytes;                    // whether x is uint8
  int32_t pixels;                   // whether the three channels of a pixel lie side by side
};

struct UniformCall {
  int64_t size;            // of this record, in bytes
  float* out;              // [B, count]
  const int64_t* ids;      // [B]
  const int64_t* streams;  // [B]
  int64_t seed, offset;
  int64_t batch, count;
};

// One axis of a crop: target pixel i is the sum over k < count[i] of weight[i * most + k] times source pixel
// first[i] + k.
struct Axis {
  int64_t begin, end;  // the source pixels that may be read
  int64_t most;
  std::vector<int64_t> first, count;
  std::vector<float> weight;
};

// A Gaussian: its weight at each distance up to reach, and by which each place's sum is divided, as a factor.
struct Gauss {
  int64_t reach = 0;
  bool mirrored = false;  // at the border; else there is nothing
  std::vector<float> weight, scale;
};

// What a view does to the colours, in order; contrast is at place `contrast`, or it is `count`.
struct Colours {
  int count = 0, contrast = 0;
  int64_t change[4];
  float factor[4];
  bool gray = false;
};

// Memory of one thread for views of one size, in floats; a row of the view is `stride` of them.
struct Workshop {
  int64_t side, stride, plane, line;
  std::vector<float> planes, other, lines, columns;
  Axis rows, cols;
  Gauss gauss;
  std::vector<const float*> near;  // rows of a plane that a row's blur reads
  std::vector<float> near_weight;

  explicit Workshop(const AugmentCall& c)
      : side(c.side), stride((side + 7) / 8 * 8), plane(stride * stride), line(3 * ((c.width + 15) / 8 * 8)) {
    planes.resize(3 * plane);
    other.resize(5 * stride + 16);  // a row with its surroundings, which are at most twice as wide on either side
    lines.resize(8 * line);
    columns.resize(8 * line);
  }
};

}  // namespace poisonshield
