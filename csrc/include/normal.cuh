// Standard normal numbers by Box-Muller, those of poisonshield/random.py to a few units in the last place.
#pragma once
#include "philox.cuh"

namespace poisonshield {

// The first half of a sample's `count` numbers are cosines, the second half sines of the same pairs.
__device__ __forceinline__ float normal_at(const Stream& s, uint32_t element, uint32_t count) {
  const uint32_t pairs = (count + 1) / 2, pair = element < pairs ? element : element - pairs;
  const float radius = sqrtf(-2.0f * log1pf(-uniform_at(s, pair)));
  const float turns = 2.0f * uniform_at(s, pairs + pair);
  return radius * (element < pairs ? cospif(turns) : sinpif(turns));
}

}  // namespace poisonshield
