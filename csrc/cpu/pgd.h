// What a call of the PGD functions takes, in the order of the record in poisonshield/ops/pgd/cpu_kernels.py.
#pragma once
#include <cstdint>

namespace poisonshield {

enum Norm : int32_t { kLinf = 0, kL2 = 1, kSignL2 = 2 };

struct PgdCall {
  int64_t size;            // of this record, in bytes
  float* x;                // [B, count], dense, changed in place
  const float* grad;       // [B, count]; not read by the start
  const void* clean;       // [B, count], float32 in the space of x, or uint8 pixels
  const float* step;       // [B], in pixel units; not read by the start
  const float* eps;        // [B], in pixel units
  const float* mean;       // [C], or null where x holds pixels
  const float* std;        // [C], likewise
  const uint8_t* mask;     // [B, count], or null; where 0, x becomes clean
  const uint8_t* active;   // [B], or null; where 0, a sample stays as it is
  const int64_t* samples;  // [B] ids, read by the start
  int64_t seed, offset, stream;
  int64_t batch, count, channels;
  int64_t channel_step;  // element i is of channel i / channel_step % C
  int64_t threads;  // at most
  int64_t bytes;    // whether clean is uint8
  int32_t norm;
  float low, high;  // least and greatest pixel
};

// Elements that are worked on at a time; their sums are added up in this order whatever the threads.
constexpr int64_t kPiece = 1 << 10;

// The space of x at each place of a piece: one number for all, or one for each where channels differ.
struct Space {
  const float *mean, *std, *low, *high;
  bool alternates;
};

struct Sums {
  double vv, vd, dd;  // of v v, v d and d d: v the direction, d = x - clean, both in pixel units
};

}  // namespace poisonshield
