// Resampling along the rows and columns of a crop: eight rows of the view at a time, first down the source's columns,
// then, turned so that the eight rows lie side by side, along them.

typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint64_t Longs __attribute__((vector_size(32)));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr Words kShifts = {24, 24, 16, 16, 8, 8, 0, 0};
#else
constexpr Words kShifts = {0, 0, 8, 8, 16, 16, 24, 24};
#endif

INLINE Floats load_pixels(const float* p) { return load(p); }
// Of the same eight bytes in all pairs of lanes, each lane's own one: a plain conversion becomes long code.
INLINE Floats load_pixels(const uint8_t* p) {
  uint64_t eight;
  __builtin_memcpy(&eight, p, sizeof eight);
  const Ints bytes = Ints(Words(Longs{} + eight) >> kShifts & 255u);
  return __builtin_convertvector(Ints(SHUFFLE(bytes, bytes, 0, 2, 4, 6, 1, 3, 5, 7)), Floats);
}

template <class T, int kCount>
INLINE Floats weighted(const T* p, int64_t step, const float* weight, int64_t count) {
  Floats sum = load_pixels(p) * weight[0];
  for (int64_t k = 1; k < (kCount ? kCount : count); ++k) sum += load_pixels(p + k * step) * weight[k];
  return sum;
}

// length elements of `count` rows, weighted and added up. kCount: how many rows, or 0 for any number.
template <class T, int kCount>
static void add_rows(const T* p, int64_t step, const float* weight, int64_t count, int64_t length, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) save(to + i, weighted<T, kCount>(p + i, step, weight, count));
  for (; i < length; ++i) {
    float sum = float(p[i]) * weight[0];
    for (int64_t k = 1; k < count; ++k) sum += float(p[i + k * step]) * weight[k];
    to[i] = sum;
  }
}

template <class T>
static void add_any_rows(const T* p, int64_t step, const float* weight, int64_t count, int64_t length, float* to) {
  switch (count) {
    case 1: return add_rows<T, 1>(p, step, weight, count, length, to);
    case 2: return add_rows<T, 2>(p, step, weight, count, length, to);
    case 3: return add_rows<T, 3>(p, step, weight, count, length, to);
    case 4: return add_rows<T, 4>(p, step, weight, count, length, to);
    default: return add_rows<T, 0>(p, step, weight, count, length, to);
  }
}

// Eight target pixels of an axis along columns of eight, turned back into eight rows.
INLINE void along(const Axis& axis, const float* columns, int64_t step, int64_t first, int64_t side, Floats (&v)[8]) {
  for (int64_t j = 0; j < kLanes; ++j) {
    const int64_t i = first + j;
    v[j] = all(0.0f);
    if (i >= side) continue;
    const float* p = columns + (axis.first[i] - axis.begin) * step;
    const float* weight = axis.weight.data() + i * axis.most;
    v[j] = load(p) * weight[0];
    for (int64_t k = 1; k < axis.count[i]; ++k) v[j] += load(p + k * step) * weight[k];
  }
  transpose(v);
}

template <class T>
static void crop(const AugmentCall& c, int64_t sample, Workshop& w) {
  const int64_t* s = c.strides;
  const int64_t wide = w.cols.end - w.cols.begin, runs = c.pixels ? 1 : 3, run = c.pixels ? 3 * wide : wide;
  const int64_t room = (run + 7) / 8 * 8;  // of a run, in a line
  const int64_t channel = kLanes * (c.pixels ? 1 : room), step = kLanes * (c.pixels ? 3 : 1);
  const T* image = static_cast<const T*>(c.x) + sample * s[0] + w.cols.begin * s[3];
  for (int64_t y = 0; y < w.side; y += kLanes) {
    const int64_t rows = w.side - y < kLanes ? w.side - y : kLanes;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = y + r;
      for (int64_t k = 0; k < runs; ++k) {
        add_any_rows(image + w.rows.first[i] * s[2] + k * s[1], s[2], w.rows.weight.data() + i * w.rows.most,
                     w.rows.count[i], run, w.lines.data() + r * w.line + k * room);
      }
    }
    for (int64_t i = 0; i < runs * room; i += kLanes) {
      Floats v[8];
      for (int64_t r = 0; r < kLanes; ++r) v[r] = load(w.lines.data() + r * w.line + i);
      transpose(v);
      for (int64_t k = 0; k < kLanes; ++k) save(w.columns.data() + (i + k) * kLanes, v[k]);
    }
    for (int64_t k = 0; k < 3; ++k) {
      for (int64_t x = 0; x < w.side; x += kLanes) {
        Floats v[8];
        along(w.cols, w.columns.data() + k * channel, step, x, w.side, v);
        float* to = w.planes.data() + k * w.plane + y * w.stride + x;
        for (int64_t r = 0; r < rows; ++r) save(to + r * w.stride, v[r]);
      }
    }
  }
}
