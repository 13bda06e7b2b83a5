// JPEG in floats, forward and backward, as Pipeline in poisonshield/ops/jpeg/reference.py; planes are centred on 0.
// A thread walks down a picture band by band and keeps two: what a band needs of its neighbours is a row on either side.
// Included once for each level.

// Tables of one plane, transposed as the coefficients lie after one transposition. The transform is 8 times the
// orthonormal one in either direction; powers of two are exact, so that they may be anywhere.
struct Table {
  float into[64];    // 1 / (8 q): coefficients in units of the table
  float back[64];    // q / 8
  explicit Table(const float* q) {
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) {
        into[8 * j + i] = 1.0f / q[8 * i + j] * 0.125f;
        back[8 * j + i] = q[8 * i + j] * 0.125f;
      }
    }
  }
};

// The nearest whole number, halves away from zero.
INLINE Floats nearest(Floats u) {
  const Floats half = u < 0.0f ? all(-0.5f) : all(0.5f);
  return truncated(u + half);
}

INLINE Floats rounded(Floats u, int32_t rounding) {
  if (rounding == kNone) return u;
  const Floats n = nearest(u);
  if (rounding != kPoly) return n;
  const Floats e = u - n;
  return n + e * (e * e);
}

INLINE Floats slope(Floats u, int32_t rounding) {
  if (rounding == kNone || rounding == kNearest) return all(1.0f);
  const Floats e = u - nearest(u);
  return e * e * 3.0f;
}

INLINE Floats stored(Floats v, bool integer) { return integer ? floored(v + 0.5f) : v; }

// One plane of a band: eight rows of blocks side by side, or two such in the luminance of 4:2:0.
struct Plane {
  float* values;  // of x, then decoded and clamped; in the backward d loss/d decoded, then d loss/d x
  float* units;   // coefficients in units of the table, a block after the other; the backward's alone, and so is:
  float* kept;    // slope of the clamp
  float* grads;   // d loss/d values
};

struct Band {
  Plane planes[3];
};

class Smooth {
 public:
  Smooth(const JpegCall& call, const Sizes& sizes, const Stretch& stretch, bool backward)
      : call_(call), s_(sizes), at_(stretch), backward_(backward), integer_(call.integer != 0),
        luma_(call.tables + stretch.sample * 128), chroma_(call.tables + stretch.sample * 128 + 64) {
    for (auto& band : bands_) {
      for (int p = 0; p < 3; ++p) {
        const int64_t count = p == 0 ? s_.rows * s_.wide : 8 * s_.cwide;
        band.planes[p].values = scratch_.take(count);
        if (!backward) continue;
        band.planes[p].units = scratch_.take(count);
        band.planes[p].kept = scratch_.take(count);
        band.planes[p].grads = scratch_.take(count);
      }
    }
    for (auto& row : rows_) row = scratch_.take(s_.wide + 2 * kLanes);
    const float* scale = call.affine;
    const float* shift = call.affine + 3;
    for (int p = 0; p < 3; ++p) {
      bias_[p] = (p == 0 ? -128.0f : 0.0f);
      for (int c = 0; c < 3; ++c) {
        from_rgb_[p][c] = kFromRgb[p][c] * scale[c];
        bias_[p] += kFromRgb[p][c] * shift[c];
      }
    }
  }

  void forward() {
    walk(s_, at_, [this](int64_t m, bool luma) { code(m, luma); }, [this](int64_t y) { emit(y); });
  }

  void backward() {
    for (int64_t m = first_band(); m < last_band(); ++m) {
      code(m, true);
      clear_grads(m);
      const int64_t end = std::min(rows_done(m), std::min(at_.last * s_.rows + s_.halo, s_.h));
      const int64_t start = std::max(at_.first, m) * s_.rows - s_.halo;
      for (int64_t y = std::max<int64_t>(start, 0); y < end; ++y) spread(y);
      if (s_.halo && m > at_.first) finish(m - 1);
      if (m < at_.last && (!s_.halo || m == s_.bands - 1)) finish(m);
    }
  }

 private:
  static constexpr float kFromRgb[3][3] = {{0.299f, 0.587f, 0.114f},
                                           {float(-0.299 / 1.772), float(-0.587 / 1.772), 0.5f},
                                           {0.5f, float(-0.587 / 1.402), float(-0.114 / 1.402)}};
  static constexpr float kRedCr = 1.402f, kBlueCb = 1.772f;
  static constexpr float kGreenCb = float(-0.114 * 1.772 / 0.587), kGreenCr = float(-0.299 * 1.402 / 0.587);

  int64_t first_band() const { return std::max<int64_t>(0, at_.first - s_.halo); }
  int64_t last_band() const { return std::min(s_.bands, at_.last + s_.halo); }
  // Rows of pixels that can be made once band m is decoded.
  int64_t rows_done(int64_t m) const { return m == s_.bands - 1 ? s_.h : (m + 1) * s_.rows - s_.halo; }
  Band& band(int64_t m) { return bands_[m & 1]; }
  const Table& table(int p) const { return p == 0 ? luma_ : chroma_; }
  int64_t width(int p) const { return p == 0 ? s_.wide : s_.cwide; }
  int64_t height(int p) const { return p == 0 ? s_.rows : 8; }
  // A row of a plane of the picture: luminance y, or chrominance row r.
  float* luma_row(float* Plane::*array, int64_t y) {
    return band(y / s_.rows).planes[0].*array + y % s_.rows * s_.wide;
  }
  float* chroma_row(float* Plane::*array, int p, int64_t r) {
    return band(r / 8).planes[p].*array + r % 8 * s_.cwide;
  }

  void code(int64_t m, bool luma) {
    s_.half ? split_half(m) : split_whole(m);
    for (int p = luma ? 0 : 1; p < 3; ++p) {
      const Plane& plane = band(m).planes[p];
      for (int64_t top = 0; top < height(p); top += 8) {
        for (int64_t left = 0; left < width(p); left += 8) {
          const int64_t at = top * width(p) + left;
          code_block(plane.values + at, width(p), table(p), backward_ ? plane.units + top * width(p) + left * 8 : nullptr,
                     backward_ ? plane.kept + at : nullptr);
        }
      }
    }
  }

  // Y, Cb or Cr of eight pixels.
  INLINE Floats mixed(const Floats (&rgb)[3], const float (&weights)[3], float bias, bool integer) {
    return stored(rgb[0] * weights[0] + rgb[1] * weights[1] + rgb[2] * weights[2] + bias, integer);
  }

  void split_whole(int64_t m) {
    Band& b = band(m);
    float* const rgb[3] = {rows_[0], rows_[1], rows_[2]};
    for (int64_t r = 0; r < 8; ++r) {
      load_rows<float>(call_.x, at_.sample, std::min(m * 8 + r, s_.h - 1), s_.w, s_.wide, rgb);
      for (int64_t i = 0; i < s_.wide; i += kLanes) {
        const Floats v[3] = {load(rgb[0] + i), load(rgb[1] + i), load(rgb[2] + i)};
        for (int p = 0; p < 3; ++p) {
          save(b.planes[p].values + r * s_.wide + i, mixed(v, from_rgb_[p], bias_[p], integer_));
        }
      }
    }
  }

  void split_half(int64_t m) {
    Band& b = band(m);
    float* const upper[3] = {rows_[0], rows_[1], rows_[2]};
    float* const lower[3] = {rows_[3], rows_[4], rows_[5]};
    for (int64_t r = 0; r < 8; ++r) {
      const int64_t y = m * 16 + 2 * r;
      load_rows<float>(call_.x, at_.sample, std::min(y, s_.h - 1), s_.w, s_.wide, upper);
      load_rows<float>(call_.x, at_.sample, std::min(y + 1, s_.h - 1), s_.w, s_.wide, lower);
      float* luma = b.planes[0].values + 2 * r * s_.wide;
      for (int64_t i = 0; i < s_.wide; i += 2 * kLanes) {
        Floats sums[3][2];
        for (int k = 0; k < 2; ++k) {
          const int64_t j = i + k * kLanes;
          const Floats u[3] = {load(upper[0] + j), load(upper[1] + j), load(upper[2] + j)};
          const Floats l[3] = {load(lower[0] + j), load(lower[1] + j), load(lower[2] + j)};
          save(luma + j, mixed(u, from_rgb_[0], bias_[0], integer_));
          save(luma + s_.wide + j, mixed(l, from_rgb_[0], bias_[0], integer_));
          for (int p = 1; p < 3; ++p) {
            sums[p][k] = mixed(u, from_rgb_[p], bias_[p], integer_) + mixed(l, from_rgb_[p], bias_[p], integer_);
          }
        }
        for (int p = 1; p < 3; ++p) {
          const Floats mean = (evens(sums[p][0], sums[p][1]) + odds(sums[p][0], sums[p][1])) * 0.25f;
          save(b.planes[p].values + r * s_.cwide + i / 2, stored(mean, integer_));
        }
      }
    }
    for (int64_t r = std::max<int64_t>(s_.ch - m * 8, 0); r < 8; ++r) {  // beyond the picture: the last averaged row
      for (int p = 1; p < 3; ++p) {
        float* row = b.planes[p].values + r * s_.cwide;
        __builtin_memcpy(row, row - s_.cwide, s_.cwide * sizeof(float));
      }
    }
  }

  // A block decoded in its place. units, kept: written where the backward asks for them.
  INLINE void code_block_at(float* block, int64_t stride, const Table& t, int32_t rounding, bool integer, float clamp_grad,
                            float* units, float* kept) {
    Floats v[8];
    for (int i = 0; i < 8; ++i) v[i] = load(block + i * stride);
    forward_pass<FloatRules>(v);
    transpose(v);
    forward_pass<FloatRules>(v);
    for (int i = 0; i < 8; ++i) {
      const Floats u = v[i] * load(t.into + 8 * i);
      if (units) save(units + 8 * i, u);
      v[i] = rounded(u, rounding) * load(t.back + 8 * i);
    }
    inverse_pass<FloatRules>(v);
    transpose(v);
    inverse_pass<FloatRules>(v);
    for (int i = 0; i < 8; ++i) {
      if (kept) {
        const auto inside = (v[i] >= -128.0f) & (v[i] <= 127.0f);
        save(kept + i * stride, inside ? all(1.0f) : all(clamp_grad));
      }
      save(block + i * stride, stored(clamped(v[i], all(-128.0f), all(127.0f)), integer));
    }
  }

  void code_block(float* block, int64_t stride, const Table& t, float* units, float* kept) {
    code_block_at(block, stride, t, call_.rounding, integer_, call_.clamp_grad, units, kept);
  }

  // Cb or Cr of row y of the picture, at full width: in `to`, or where it lies already.
  const float* enlarged(int p, int64_t y, float* to) {
    if (!s_.half) return chroma_row(&Plane::values, p, y);
    const int64_t r = y / 2;
    const float* near = chroma_row(&Plane::values, p, r);
    if (!s_.smooth) {
      for (int64_t i = 0; i < s_.cwide; i += kLanes) {
        const Floats v = stored(load(near + i), integer_);
        save_alternating(to + 2 * i, v, v);
      }
      return to;
    }
    const float* far = chroma_row(&Plane::values, p, std::clamp<int64_t>(y % 2 ? r + 1 : r - 1, 0, s_.ch - 1));
    float* mid = rows_[6];
    for (int64_t i = 0; i < s_.cwide; i += kLanes) save(mid + i, load(near + i) * 0.75f + load(far + i) * 0.25f);
    mid[-1] = mid[0];
    mid[s_.cw] = mid[s_.cw - 1];
    for (int64_t i = 0; i < s_.cwide; i += kLanes) {
      const Floats v = load(mid + i) * 0.75f;
      save_alternating(to + 2 * i, stored(v + load(mid + i - 1) * 0.25f, integer_),
                       stored(v + load(mid + i + 1) * 0.25f, integer_));
    }
    return to;
  }

  // Red, green and blue of eight pixels in 0..255, not clamped.
  INLINE void colours(Floats y, Floats cb, Floats cr, Floats (&rgb)[3]) {
    y = y + 128.0f;
    rgb[0] = y + cr * kRedCr;
    rgb[1] = y + cb * kGreenCb + cr * kGreenCr;
    rgb[2] = y + cb * kBlueCb;
  }

  void emit(int64_t y) {
    const float* luma = luma_row(&Plane::values, y);
    const float* cb = enlarged(1, y, rows_[0]);
    const float* cr = enlarged(2, y, rows_[1]);
    float* const out[3] = {rows_[2], rows_[3], rows_[4]};
    for (int64_t i = 0; i < s_.wide; i += kLanes) {
      Floats rgb[3];
      colours(load(luma + i), load(cb + i), load(cr + i), rgb);
      for (int c = 0; c < 3; ++c) {
        const Floats v = stored(clamped(rgb[c], all(0.0f), all(255.0f)), integer_);
        save(out[c] + i, (v - call_.affine[3 + c]) / call_.affine[c]);
      }
    }
    store_rows<float>(call_.out, at_.sample, y, s_.w, out);
  }

  void clear_grads(int64_t m) {
    for (int p = 0; p < 3; ++p) {
      std::fill_n(band(m).planes[p].grads, height(p) * width(p), 0.0f);
    }
  }

  // d loss/d picture of row y, through the last clamp and the colours, to the planes.
  void spread(int64_t y) {
    const float* luma = luma_row(&Plane::values, y);
    const float* cb = enlarged(1, y, rows_[0]);
    const float* cr = enlarged(2, y, rows_[1]);
    float* const grads[3] = {rows_[2], rows_[3], rows_[4]};
    load_rows<float>(call_.grad, at_.sample, y, s_.w, s_.w, grads);
    for (float* row : grads) std::fill(row + s_.w, row + s_.wide, 0.0f);
    float* to_luma = luma_row(&Plane::grads, y);
    float* to_cb = s_.half ? rows_[2] : chroma_row(&Plane::grads, 1, y);
    float* to_cr = s_.half ? rows_[3] : chroma_row(&Plane::grads, 2, y);
    for (int64_t i = 0; i < s_.wide; i += kLanes) {
      Floats rgb[3], g[3];
      colours(load(luma + i), load(cb + i), load(cr + i), rgb);
      for (int c = 0; c < 3; ++c) {
        const auto inside = (rgb[c] >= 0.0f) & (rgb[c] <= 255.0f);
        g[c] = load(grads[c] + i) / call_.affine[c] * (inside ? all(1.0f) : all(call_.clamp_grad));
      }
      save(to_luma + i, g[0] + g[1] + g[2]);
      save(to_cb + i, g[2] * kBlueCb + g[1] * kGreenCb);
      save(to_cr + i, g[0] * kRedCr + g[1] * kGreenCr);
    }
    if (!s_.half) return;
    reduce(1, y, to_cb);
    reduce(2, y, to_cr);
  }

  // The adjoint of `enlarged`: a row at full width is added to the rows of chrominance that it was made of.
  void reduce(int p, int64_t y, float* row) {
    const int64_t r = y / 2;
    float* near = chroma_row(&Plane::grads, p, r);
    if (!s_.smooth) {
      for (int64_t i = 0; i < s_.cwide; i += kLanes) {
        const Floats a = load(row + 2 * i), b = load(row + 2 * i + kLanes);
        save(near + i, load(near + i) + (evens(a, b) + odds(a, b)));
      }
      return;
    }
    float *even = rows_[5], *odd = rows_[6];
    for (int64_t i = 0; i < s_.cwide; i += kLanes) {
      const Floats a = load(row + 2 * i), b = load(row + 2 * i + kLanes);
      save(even + i, evens(a, b));
      save(odd + i, odds(a, b));
    }
    odd[-1] = even[0];  // what lay beyond an end was a copy of it
    even[s_.cw] = odd[s_.cw - 1];
    odd[s_.cw] = 0.0f;
    float* far = chroma_row(&Plane::grads, p, std::clamp<int64_t>(y % 2 ? r + 1 : r - 1, 0, s_.ch - 1));
    for (int64_t i = 0; i < s_.cwide; i += kLanes) {
      const Floats near_sum = load(even + i) + load(odd + i), far_sum = load(odd + i - 1) + load(even + i + 1);
      const Floats v = near_sum * 0.75f + far_sum * 0.25f;
      save(near + i, load(near + i) + v * 0.75f);
      save(far + i, load(far + i) + v * 0.25f);
    }
    for (int64_t i = s_.cw; i < s_.cwide; ++i) near[i] = far[i] = 0.0f;
  }

  // d loss/d x of a band whose rows have all been spread.
  void finish(int64_t m) {
    Band& b = band(m);
    float* sums = call_.table_sums ? call_.table_sums + (at_.sample * s_.bands + m) * 128 : nullptr;
    if (sums) std::fill_n(sums, 128, 0.0f);
    for (int p = 0; p < 3; ++p) {
      const Plane& plane = b.planes[p];
      for (int64_t top = 0; top < height(p); top += 8) {
        for (int64_t left = 0; left < width(p); left += 8) {
          const int64_t at = top * width(p) + left;
          return_block(plane.grads + at, plane.kept + at, width(p), plane.units + top * width(p) + left * 8,
                       call_.rounding, sums ? sums + (p == 0 ? 0 : 64) : nullptr);
        }
      }
    }
    if (sums) untranspose(sums);
    fold_rows(m);
    for (int64_t y = m * s_.rows; y < std::min((m + 1) * s_.rows, s_.h); ++y) write_gradient(b, m, y);
  }

  // d loss/d block before the transform, from that after it, in place; and the gradient of the table, added to sums.
  INLINE void return_block(float* grads, const float* kept, int64_t stride, const float* units, int32_t rounding,
                           float* sums) {
    Floats v[8];
    for (int i = 0; i < 8; ++i) v[i] = load(grads + i * stride) * load(kept + i * stride);
    forward_pass<FloatRules>(v);
    transpose(v);
    forward_pass<FloatRules>(v);
    for (int i = 0; i < 8; ++i) {
      const Floats u = load(units + 8 * i), by_u = slope(u, rounding), g = v[i] * 0.125f;
      if (sums) save(sums + 8 * i, load(sums + 8 * i) + g * (rounded(u, rounding) - u * by_u));
      v[i] = g * by_u * 0.125f;
    }
    inverse_pass<FloatRules>(v);
    transpose(v);
    inverse_pass<FloatRules>(v);
    for (int i = 0; i < 8; ++i) save(grads + i * stride, v[i]);
  }

  void untranspose(float* sums) {
    for (int t = 0; t < 128; t += 64) {
      Floats v[8];
      for (int i = 0; i < 8; ++i) v[i] = load(sums + t + 8 * i);
      transpose(v);
      for (int i = 0; i < 8; ++i) save(sums + t + 8 * i, v[i]);
    }
  }

  // Rows beyond the picture were copies of its last one.
  void fold_rows(int64_t m) {
    for (int p = 0; p < 3; ++p) {
      const int64_t inside = (p == 0 ? s_.h : s_.ch) - m * height(p);
      for (int64_t r = inside; r < height(p); ++r) {
        float* last = band(m).planes[p].grads + (inside - 1) * width(p);
        const float* beyond = band(m).planes[p].grads + r * width(p);
        for (int64_t i = 0; i < width(p); i += kLanes) save(last + i, load(last + i) + load(beyond + i));
      }
    }
  }

  void write_gradient(Band& b, int64_t m, int64_t y) {
    const int64_t r = y - m * s_.rows;
    float* luma = b.planes[0].grads + r * s_.wide;
    float* chroma[2] = {rows_[0], rows_[1]};
    for (int p = 1; p < 3; ++p) {
      if (!s_.half) {
        chroma[p - 1] = b.planes[p].grads + r * s_.wide;
        continue;
      }
      const float share = y == s_.h - 1 && s_.h % 2 ? 0.5f : 0.25f;  // an odd height's last row counts twice
      const float* row = b.planes[p].grads + r / 2 * s_.cwide;
      for (int64_t i = 0; i < s_.cwide; i += kLanes) {
        const Floats v = load(row + i) * share;
        save_alternating(chroma[p - 1] + 2 * i, v, v);
      }
    }
    for (float* row : {luma, chroma[0], chroma[1]}) {  // columns beyond the picture were copies of its last one
      for (int64_t i = s_.w; i < s_.wide; ++i) row[s_.w - 1] += row[i];
    }
    float* const out[3] = {rows_[2], rows_[3], rows_[4]};
    for (int64_t i = 0; i < s_.wide; i += kLanes) {
      const Floats dy = load(luma + i), dcb = load(chroma[0] + i), dcr = load(chroma[1] + i);
      for (int c = 0; c < 3; ++c) {
        const Floats v = dy * kFromRgb[0][c] + dcb * kFromRgb[1][c] + dcr * kFromRgb[2][c];
        save(out[c] + i, v * call_.affine[c]);
      }
    }
    store_rows<float>(call_.out, at_.sample, y, s_.w, out);
  }

  const JpegCall& call_;
  const Sizes& s_;
  const Stretch at_;
  const bool backward_, integer_;
  const Table luma_, chroma_;
  float from_rgb_[3][3], bias_[3];
  Scratch scratch_;
  Band bands_[2];
  float* rows_[7];
};

constexpr float Smooth::kFromRgb[3][3];

static void smooth_forward(const JpegCall& call, const Sizes& sizes, const Stretch& stretch) {
  Smooth(call, sizes, stretch, false).forward();
}

static void smooth_backward(const JpegCall& call, const Sizes& sizes, const Stretch& stretch) {
  Smooth(call, sizes, stretch, true).backward();
}
