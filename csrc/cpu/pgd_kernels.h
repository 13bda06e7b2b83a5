// The PGD step and the random start over a run of elements. Included once for each level.
#include "vectors.h"

typedef uint8_t Bytes __attribute__((vector_size(8)));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint64_t Words __attribute__((vector_size(32)));

INLINE Floats at(const float* values, int64_t i, bool alternates) { return alternates ? load(values + i) : all(values[0]); }

// Up to eight elements; others read as 0 and are not written.
template <class V, class T>
INLINE V load_some(const T* p, int64_t count) {
  V v = {};
  if (count >= kLanes) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
    __builtin_memcpy(&v, p, count * sizeof(T));
  }
  return v;
}
INLINE void save_some(float* p, Floats v, int64_t count) {
  if (count >= kLanes) {
    save(p, v);
  } else {
    __builtin_memcpy(p, &v, count * sizeof(float));
  }
}

INLINE Floats signs(Floats g) { return (g > 0.0f ? all(1.0f) : all(0.0f)) - (g < 0.0f ? all(1.0f) : all(0.0f)); }

// Eight elements of a sample on their way.
struct Place {
  int64_t i, left;  // from the start of the run; how many there are
  Floats mean, std, low, high, origin;
  Ints masked;  // or not there at all
};

INLINE Place place_of(const PgdCall& c, const Space& s, int64_t start, int64_t i, int64_t count) {
  Place p;
  p.i = start + i;
  p.left = count - i;
  p.mean = at(s.mean, i, s.alternates);
  p.std = at(s.std, i, s.alternates);
  p.low = at(s.low, i, s.alternates);
  p.high = at(s.high, i, s.alternates);
  if (c.bytes) {
    const Bytes raw = load_some<Bytes>(static_cast<const uint8_t*>(c.clean) + p.i, p.left);
    p.origin = (__builtin_convertvector(raw, Floats) / 255.0f - p.mean) / p.std;
  } else {
    p.origin = load_some<Floats>(static_cast<const float*>(c.clean) + p.i, p.left);
  }
  p.masked = Ints{0, 1, 2, 3, 4, 5, 6, 7} >= int32_t(p.left < kLanes ? p.left : kLanes);
  if (c.mask) p.masked |= __builtin_convertvector(load_some<Bytes>(c.mask + p.i, p.left), Ints) == 0;
  return p;
}

INLINE void finish(const PgdCall& c, const Place& p, Floats v) { save_some(c.x + p.i, p.masked ? p.origin : v, p.left); }

static void linf_run(const PgdCall& c, const Space& s, int64_t sample, int64_t start, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Place p = place_of(c, s, start, i, count);
    const Floats stride = c.step[sample] / p.std, reach = c.eps[sample] / p.std;
    const Floats low = clamped(p.origin - reach, p.low, p.high), high = clamped(p.origin + reach, p.low, p.high);
    const Floats moved = load_some<Floats>(c.x + p.i, p.left) + signs(load_some<Floats>(c.grad + p.i, p.left)) * stride;
    const auto usable = p.origin == p.origin;
    finish(c, p, usable ? clamped(moved, low, high) : p.origin);
  }
}

INLINE Floats direction(const PgdCall& c, const Place& p) {
  const Floats g = load_some<Floats>(c.grad + p.i, p.left);
  return p.masked ? all(0.0f) : c.norm == kSignL2 ? signs(g) : g / p.std;
}

static Sums ball_sums(const PgdCall& c, const Space& s, int64_t start, int64_t count) {
  Doubles vv = {}, vd = {}, dd = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Place p = place_of(c, s, start, i, count);
    const Floats apart = (load_some<Floats>(c.x + p.i, p.left) - p.origin) * p.std;
    const Doubles v = __builtin_convertvector(direction(c, p), Doubles);
    const Doubles d = __builtin_convertvector(p.masked ? all(0.0f) : apart, Doubles);
    vv += v * v;
    vd += v * d;
    dd += d * d;
  }
  Sums sums = {0, 0, 0};
  for (int k = 0; k < kLanes; ++k) {
    sums.vv += vv[k];
    sums.vd += vd[k];
    sums.dd += dd[k];
  }
  return sums;
}

// A step of `scale` times the direction, and the distance from clean times `shrink`.
static void ball_run(const PgdCall& c, const Space& s, double scale, float shrink, int64_t start, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Place p = place_of(c, s, start, i, count);
    Floats d = (load_some<Floats>(c.x + p.i, p.left) - p.origin) * p.std;
    if (scale != 0) {
      d += __builtin_convertvector(__builtin_convertvector(direction(c, p), Doubles) * scale, Floats);
    }
    finish(c, p, clamped(p.origin + d * shrink / p.std, p.low, p.high));
  }
}

// Philox4x32-10 of four blocks at a time, 16 numbers in [0, 1): csrc/include/philox.cuh, in 64-bit lanes.
static void draw(const PgdCall& c, int64_t sample, int64_t block, float (&u)[16]) {
  const uint64_t id = uint64_t(c.samples[sample]), seed = uint64_t(c.seed), low = 0xffffffffu;
  uint64_t k0 = (seed & low) ^ (id >> 32), k1 = seed >> 32;
  Words c0 = (Words{0, 1, 2, 3} + uint64_t(block)) & low, c1 = Words{} + (id & low);
  Words c2 = Words{} + (uint64_t(c.offset) & low), c3 = Words{} + (uint64_t(c.stream) & low);
  for (int round = 0; round < 10; ++round) {
    const Words p0 = c0 * uint64_t(0xD2511F53u), p1 = c2 * uint64_t(0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c1 = p1 & low;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c3 = p0 & low;
    k0 = (k0 + 0x9E3779B9u) & low;
    k1 = (k1 + 0xBB67AE85u) & low;
  }
  for (int k = 0; k < 4; ++k) {
    u[4 * k] = float(uint32_t(c0[k]) >> 8) * 5.9604644775390625e-08f;
    u[4 * k + 1] = float(uint32_t(c1[k]) >> 8) * 5.9604644775390625e-08f;
    u[4 * k + 2] = float(uint32_t(c2[k]) >> 8) * 5.9604644775390625e-08f;
    u[4 * k + 3] = float(uint32_t(c3[k]) >> 8) * 5.9604644775390625e-08f;
  }
}

// The run starts at element `element` of its sample, a multiple of 4.
static void start_run(const PgdCall& c, const Space& s, int64_t sample, int64_t element, int64_t start, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    float u[16];
    draw(c, sample, (element + i) / 4, u);
    for (int64_t k = 0; k < 16 && i + k < count; k += kLanes) {
      const Place p = place_of(c, s, start, i + k, count);
      const Floats delta = (load(u + k) * 2.0f - 1.0f) * (c.eps[sample] / p.std);
      finish(c, p, clamped(p.origin + delta, p.low, p.high));
    }
  }
}
