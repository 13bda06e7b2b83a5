// The blur of a view's planes, along rows in place and then down columns, and the way out: clamped, three channels of a
// pixel side by side.

// Eight sums of a Gaussian's weights times what lies around p.
INLINE Floats around(const float* p, const Gauss& gauss) {
  Floats sum = load(p) * gauss.weight[0];
  for (int64_t d = 1; d <= gauss.reach; ++d) sum += (load(p - d) + load(p + d)) * gauss.weight[d];
  return sum;
}

static void blur_row(float* row, int64_t side, int64_t stride, const Gauss& gauss, float* wide) {
  const int64_t reach = gauss.reach;
  float* middle = wide + reach;
  __builtin_memcpy(middle, row, side * sizeof(float));
  for (int64_t d = 1; d <= reach; ++d) {
    const bool there = gauss.mirrored && d < side;
    middle[-d] = there ? row[d] : 0.0f;
    middle[side - 1 + d] = there ? row[side - 1 - d] : 0.0f;
  }
  for (int64_t x = 0; x < stride; x += kLanes) save(row + x, around(middle + x, gauss) * load(&gauss.scale[x]));
}

// Row y of a plane, blurred down its columns.
static void blur_column(Workshop& w, const float* plane, int64_t y, float* to) {
  const Gauss& gauss = w.gauss;
  int64_t count = 0;
  for (int64_t d = -gauss.reach; d <= gauss.reach; ++d) {
    int64_t at = y + d;
    if (gauss.mirrored) at = at < 0 ? -at : at >= w.side ? 2 * (w.side - 1) - at : at;
    if (at < 0 || at >= w.side) continue;
    w.near[count] = plane + at * w.stride;
    w.near_weight[count++] = gauss.weight[d < 0 ? -d : d];
  }
  for (int64_t x = 0; x < w.stride; x += kLanes) {
    Floats sum = load(w.near[0] + x) * w.near_weight[0];
    for (int64_t k = 1; k < count; ++k) sum += load(w.near[k] + x) * w.near_weight[k];
    save(to + x, sum * gauss.scale[y]);
  }
}

// r, g and b of eight pixels as 24 numbers.
INLINE void save_pixels(float* to, Floats r, Floats g, Floats b) {
  save(to, SHUFFLE(SHUFFLE(r, g, 0, 8, 0, 1, 9, 1, 2, 10), b, 0, 1, 8, 3, 4, 9, 6, 7));
  save(to + 8, SHUFFLE(SHUFFLE(r, g, 0, 3, 11, 3, 4, 12, 4, 5), b, 10, 1, 2, 11, 4, 5, 12, 7));
  save(to + 16, SHUFFLE(SHUFFLE(r, g, 13, 5, 6, 14, 6, 7, 15, 7), b, 0, 13, 2, 3, 14, 5, 6, 15));
}

static void save_row(const float* const (&rows)[3], int64_t side, float* to) {
  for (int64_t x = 0; x < side; x += kLanes) {
    Floats v[3];
    for (int k = 0; k < 3; ++k) v[k] = clamped(load(rows[k] + x), all(0.0f), all(1.0f));
    if (x + kLanes <= side) {
      save_pixels(to + 3 * x, v[0], v[1], v[2]);
    } else {
      float last[3 * kLanes];
      save_pixels(last, v[0], v[1], v[2]);
      __builtin_memcpy(to + 3 * x, last, 3 * (side - x) * sizeof(float));
    }
  }
}

static void finish_view(Workshop& w, bool gray, float* to) {
  const int planes = gray ? 1 : 3;
  const bool blurred = w.gauss.reach > 0;
  for (int k = 0; k < planes && blurred; ++k) {
    for (int64_t y = 0; y < w.side; ++y) {
      blur_row(w.planes.data() + k * w.plane + y * w.stride, w.side, w.stride, w.gauss, w.other.data());
    }
  }
  for (int64_t y = 0; y < w.side; ++y) {
    const float* rows[3];
    for (int k = 0; k < planes; ++k) {
      const float* plane = w.planes.data() + k * w.plane;
      rows[k] = plane + y * w.stride;
      if (!blurred) continue;
      float* here = w.other.data() + k * w.stride;
      blur_column(w, plane, y, here);
      rows[k] = here;
    }
    if (gray) rows[1] = rows[2] = rows[0];
    save_row(rows, w.side, to + 3 * y * w.side);
  }
}
