// Philox4x32-10 (Salmon et al. 2011) with the counters of poisonshield/random.py: key = seed, its low half xored with the
// upper half of the sample's id; counter = (element / 4, sample id, offset, stream). Compiles as plain C++ for tests too.
#pragma once
#include <stdint.h>

#ifndef __CUDACC__
#define __host__
#define __device__
#define __forceinline__ inline
#endif

namespace poisonshield {

struct Words {
  uint32_t w[4];
};

struct Stream {
  int64_t seed, offset, id, stream;
};

__host__ __device__ __forceinline__ Words philox(const Stream& s, uint32_t block) {
  uint32_t k0 = uint32_t(uint64_t(s.seed)) ^ uint32_t(uint64_t(s.id) >> 32), k1 = uint32_t(uint64_t(s.seed) >> 32);
  uint32_t c0 = block, c1 = uint32_t(uint64_t(s.id)), c2 = uint32_t(uint64_t(s.offset)), c3 = uint32_t(uint64_t(s.stream));
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// In [0, 1): the top 24 bits, exact in float32.
__host__ __device__ __forceinline__ float uniform(uint32_t word) {
  return float(word >> 8) * 5.9604644775390625e-08f;
}

__host__ __device__ __forceinline__ float uniform_at(const Stream& s, uint32_t element) {
  const Words words = philox(s, element / 4);
  const uint32_t place = element % 4;
  const uint32_t low = place & 1 ? words.w[1] : words.w[0], high = place & 1 ? words.w[3] : words.w[2];
  return uniform(place & 2 ? high : low);
}

}  // namespace poisonshield
