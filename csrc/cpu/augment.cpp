// Views of images, and the random numbers that they are drawn by, on the CPU. Called through a plain C interface, so
// that it is built without torch. Semantics: poisonshield/ops/augment/reference.py.
#include "augment.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <vector>

#include "threads.h"

#define POISONSHIELD_KERNELS "augment_kernels.h"
#include "levels.h"

namespace poisonshield {
namespace {

constexpr int64_t kWorthAThread = 1 << 13;  // pixels of views
constexpr int64_t kPieces = 4;              // of the batch, a thread: some views cost more than others
constexpr float kFar = 5.9f;                // standard deviations; beyond, a weight is below 2^-25 of the middle one

// v as a whole number, rounded up, within low .. high; low where it is NaN.
int64_t bounded(float v, int64_t low, int64_t high) {
  return v >= float(high) ? high : v >= float(low) ? std::max(low, int64_t(std::ceil(v))) : low;
}

// Antialiased bilinear weights: the triangle of half width max(scale, 1) around each target pixel's middle, in the
// reference's float32 steps. box: where it starts, and two numbers on, how long it is. unit scales the result.
void plan(Axis& axis, const float* box, int64_t source, int64_t grid, int64_t side, bool mirrored, float unit) {
  const float start = box[0], length = box[2], scale = length / float(grid), support = std::max(scale, 1.0f);
  const int64_t first = std::lrint((grid - side) / 2.0);  // half to even
  axis.begin = bounded(start, 0, source - 1);
  axis.end = bounded(start + length, axis.begin + 1, source);
  axis.most = bounded(2 * support + 2, 1, axis.end - axis.begin);
  axis.first.resize(side);
  axis.count.resize(side);
  axis.weight.resize(side * axis.most);
  for (int64_t i = 0; i < side; ++i) {
    const float middle = start + (float(first + (mirrored ? side - 1 - i : i)) + 0.5f) * scale;
    float *weight = &axis.weight[i * axis.most], sum = 0;
    int64_t count = 0, p = bounded(middle - support - 1.5f, axis.begin, axis.end - 1);
    axis.first[i] = p;
    for (; p < axis.end && count < axis.most; ++p) {
      const float here = 1 - std::fabs((float(p) + 0.5f - middle) / support);
      if (here > 0) {
        if (!count) axis.first[i] = p;
        weight[count++] = here;
        sum += here;
      } else if (count) {
        break;
      }
    }
    if (!count) {  // a box without a pixel of the image
      weight[count++] = std::numeric_limits<float>::quiet_NaN();
      sum = 1;
    }
    axis.count[i] = count;
    for (int64_t k = 0; k < count; ++k) weight[k] = weight[k] / sum * unit;
  }
}

void plan(Workshop& w, float sigma, int64_t kernel) {
  Gauss& gauss = w.gauss;
  const int64_t widest = kernel ? std::min(kernel / 2, 2 * (w.side - 1)) : w.side - 1;
  gauss.mirrored = kernel != 0;
  gauss.reach = sigma >= 0 ? std::min(widest, int64_t(std::min(kFar * sigma, 1e9f))) : 0;
  if (!gauss.reach) return;
  gauss.weight.resize(gauss.reach + 1);
  for (int64_t d = 0; d <= gauss.reach; ++d) gauss.weight[d] = std::exp(-float(d * d) / (2 * sigma * sigma));
  gauss.scale.assign(w.stride, 0.0f);
  for (int64_t i = 0; i < w.side; ++i) {
    const int64_t low = gauss.mirrored ? 1 - w.side : 0, high = gauss.mirrored ? 2 * (w.side - 1) : w.side - 1;
    float sum = 0;
    for (int64_t d = -gauss.reach; d <= gauss.reach; ++d) {
      if (i + d >= low && i + d <= high) sum += gauss.weight[std::abs(d)];
    }
    gauss.scale[i] = 1 / sum;
  }
  w.near.resize(2 * gauss.reach + 1);
  w.near_weight.resize(2 * gauss.reach + 1);
}

Colours colours_of(const AugmentCall& c, int64_t sample) {
  Colours colours;
  for (int i = 0; i < 4 && c.factors; ++i) {
    const int64_t change = c.order[4 * sample + i];
    if (change < 0 || change >= kNothing) continue;
    colours.change[colours.count] = change;
    colours.factor[colours.count++] = c.factors[4 * sample + change];
  }
  const auto *begin = colours.change, *end = begin + colours.count;
  colours.contrast = int(std::find(begin, end, int64_t(kContrast)) - begin);
  colours.gray = c.gray && c.gray[sample];
  return colours;
}

void augment(const AugmentCall& c) {
  const auto make_view = POISONSHIELD_BEST(make_view);
  const int64_t worth = std::max<int64_t>(1, c.batch * c.side * c.side / kWorthAThread);
  const int64_t threads = std::min(std::max<int64_t>(1, c.threads), worth);
  const int64_t units = threads == 1 ? 1 : std::min(c.batch, kPieces * threads);
  in_parallel(units, threads, [&](int64_t unit) {
    Workshop w(c);
    for (int64_t sample = unit * c.batch / units; sample < (unit + 1) * c.batch / units; ++sample) {
      const float* box = c.boxes + 4 * sample;
      plan(w.rows, box, c.height, c.grid_height, c.side, false, c.bytes ? 1 / 255.0f : 1.0f);
      plan(w.cols, box + 1, c.width, c.grid_width, c.side, c.flip && c.flip[sample], 1.0f);
      plan(w, c.sigma ? c.sigma[sample] : 0.0f, c.kernel);
      make_view(c, sample, w, colours_of(c, sample));
    }
  });
}

// Philox4x32-10, as csrc/include/philox.cuh.
void uniform(const UniformCall& c) {
  for (int64_t i = 0; i < c.batch; ++i) {
    const uint64_t id = uint64_t(c.ids[i]), seed = uint64_t(c.seed);
    for (int64_t block = 0; 4 * block < c.count; ++block) {
      uint32_t k0 = uint32_t(seed) ^ uint32_t(id >> 32), k1 = uint32_t(seed >> 32);
      uint32_t v[4] = {uint32_t(block), uint32_t(id), uint32_t(c.offset), uint32_t(c.streams[i])};
      for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(v[0]) * 0xD2511F53u, p1 = uint64_t(v[2]) * 0xCD9E8D57u;
        v[0] = uint32_t(p1 >> 32) ^ v[1] ^ k0;
        v[1] = uint32_t(p1);
        v[2] = uint32_t(p0 >> 32) ^ v[3] ^ k1;
        v[3] = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      for (int64_t k = 0; k < 4 && 4 * block + k < c.count; ++k) {
        c.out[i * c.count + 4 * block + k] = float(v[k] >> 8) * 5.9604644775390625e-08f;  // 2^-24
      }
    }
  }
}

template <class Call>
int guarded(const Call* call, void (*work)(const Call&)) {
  if (call->size != sizeof(Call)) return 2;
  try {
    work(*call);
    return 0;
  } catch (const std::exception&) {  // memory, which is all that can be short
    return 1;
  }
}

}  // namespace
}  // namespace poisonshield

extern "C" {

// 0, or 1 where memory is short, or 2 for a record of another version.
__attribute__((visibility("default"))) int poisonshield_augment(const poisonshield::AugmentCall* call) {
  return poisonshield::guarded(call, poisonshield::augment);
}

__attribute__((visibility("default"))) int poisonshield_uniform(const poisonshield::UniformCall* call) {
  return poisonshield::guarded(call, poisonshield::uniform);
}
}
