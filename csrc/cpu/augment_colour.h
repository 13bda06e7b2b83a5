// Brightness, contrast, saturation, hue and gray on the planes of a view: one pass up to contrast, which needs the mean
// of all pixels, and one from there. Columns beyond the view's side are black until then, so that no sum counts them.

struct Pixel {
  Floats r, g, b;
};

INLINE Floats luma(const Pixel& p) { return p.r * 0.299f + p.g * 0.587f + p.b * 0.114f; }

// Towards `other`, or beyond: factor 1 changes nothing.
INLINE Floats mixed(Floats v, Floats other, float factor) {
  return clamped(other + (v - other) * factor, all(0.0f), all(1.0f));
}
INLINE Pixel mixed(const Pixel& p, Floats other, float factor) {
  return {mixed(p.r, other, factor), mixed(p.g, other, factor), mixed(p.b, other, factor)};
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// A channel of the colour whose hue is `sixths` of the circle, through HSV. turn: 5, 3, 1 for red, green, blue.
INLINE Floats channel_of(Floats sixths, Floats value, Floats spread, float turn) {
  Floats k = sixths + turn;
  k -= 6.0f * floored(k * (1.0f / 6.0f));
  return value - spread * clamped(smaller(k, 4.0f - k), all(0.0f), all(1.0f));
}

INLINE Pixel turned(const Pixel& p, float turns) {
  const Floats value = larger(larger(p.r, p.g), p.b), spread = value - smaller(smaller(p.r, p.g), p.b);
  const auto red = value == p.r, green = value == p.g;
  const Floats apart = red ? p.g - p.b : green ? p.b - p.r : p.r - p.g;
  const Floats start = red ? all(0.0f) : green ? all(2.0f) : all(4.0f);
  const Floats sixths = apart / larger(spread, all(1e-8f)) + start + 6.0f * turns;
  return {channel_of(sixths, value, spread, 5.0f), channel_of(sixths, value, spread, 3.0f),
          channel_of(sixths, value, spread, 1.0f)};
}

INLINE Pixel changed(const Pixel& p, int64_t change, float factor, float mean) {
  switch (change) {
    case kBrightness: return mixed(p, all(0.0f), factor);
    case kContrast: return mixed(p, all(mean), factor);
    case kSaturation: return mixed(p, luma(p), factor);
    case kHue: return turned(p, factor);
    default: return p;
  }
}

// Changes first .. last-1 of all pixels, and gray if asked for; the sum of the luma that is left.
static double change_all(Workshop& w, const Colours& colours, int first, int last, float mean, bool gray) {
  double sum = 0;
  for (int64_t y = 0; y < w.side; ++y) {
    float* row = w.planes.data() + y * w.stride;
    Floats of_row = {};
    for (int64_t x = 0; x < w.stride; x += kLanes) {
      Pixel p = {load(row + x), load(row + x + w.plane), load(row + x + 2 * w.plane)};
      for (int i = first; i < last; ++i) p = changed(p, colours.change[i], colours.factor[i], mean);
      const Floats light = luma(p);
      of_row += light;
      save(row + x, gray ? light : p.r);
      if (gray) continue;  // one plane serves for all three
      save(row + x + w.plane, p.g);
      save(row + x + 2 * w.plane, p.b);
    }
    for (int64_t k = 0; k < kLanes; ++k) sum += of_row[k];
  }
  return sum;
}

static void recolour(Workshop& w, const Colours& colours) {
  if (!colours.count && !colours.gray) return;
  float mean = 0;
  int first = 0;
  if (colours.contrast < colours.count) {
    first = colours.contrast;
    mean = float(change_all(w, colours, 0, first, 0.0f, false) / double(w.side * w.side));
  }
  change_all(w, colours, first, colours.count, mean, colours.gray);
}
