// JPEG in libjpeg-turbo's integers: its default path to the bit, as poisonshield/ops/jpeg/exact.py. The way through a
// picture is that of jpeg_smooth.h. Included once for each level.

struct ExactTable {
  int32_t q[64];
  float inverse[64];  // 1 / (8 q)
  explicit ExactTable(const float* table) {
    for (int i = 0; i < 64; ++i) {
      q[i] = int32_t(table[i]);
      inverse[i] = 1.0f / (8.0f * float(q[i]));
    }
  }
};

template <class T>
class Exact {
 public:
  Exact(const JpegCall& call, const Sizes& sizes, const Stretch& stretch)
      : call_(call), s_(sizes), at_(stretch),
        luma_(call.tables + stretch.sample * 128), chroma_(call.tables + stretch.sample * 128 + 64) {
    for (auto& band : bands_) {
      for (int p = 0; p < 3; ++p) band[p] = scratch_.take_ints(p == 0 ? s_.rows * s_.wide : 8 * s_.cwide);
    }
    for (auto& row : rows_) row = scratch_.take_ints(s_.wide + 2 * kLanes);
    for (auto& row : pixels_) row = reinterpret_cast<T*>(scratch_.take(s_.wide + 2 * kLanes));
  }

  void forward() {
    walk(s_, at_, [this](int64_t m, bool luma) { code(m, luma); }, [this](int64_t y) { emit(y); });
  }

 private:
  int32_t** band(int64_t m) { return bands_[m & 1]; }
  int64_t width(int p) const { return p == 0 ? s_.wide : s_.cwide; }
  int32_t* luma_row(int64_t y) { return band(y / s_.rows)[0] + y % s_.rows * s_.wide; }
  int32_t* chroma_row(int p, int64_t r) { return band(r / 8)[p] + r % 8 * s_.cwide; }

  void code(int64_t m, bool luma) {
    s_.half ? split_half(m) : split_whole(m);
    for (int p = luma ? 0 : 1; p < 3; ++p) {
      for (int64_t top = 0; top < (p == 0 ? s_.rows : 8); top += 8) {
        for (int64_t left = 0; left < width(p); left += 8) {
          code_block(band(m)[p] + top * width(p) + left, width(p), p == 0 ? luma_ : chroma_);
        }
      }
    }
  }

  // Row y as whole numbers in 0..255, rounded half up; NaN becomes 0.
  void load_whole(int64_t y, int32_t* const (&to)[3]) {
    load_rows<T>(call_.x, at_.sample, std::min(y, s_.h - 1), s_.w, s_.wide, pixels_);
    for (int c = 0; c < 3; ++c) {
      if constexpr (sizeof(T) == 1) {
        for (int64_t i = 0; i < s_.wide; ++i) to[c][i] = pixels_[c][i];
      } else {
        const float scale = call_.affine[c], shift = call_.affine[3 + c];
        for (int64_t i = 0; i < s_.wide; i += kLanes) {
          const Floats v = load(pixels_[c] + i) * scale + shift + 0.5f;
          const Floats below = v < 255.0f ? v : all(255.0f), whole = v > 0.0f ? below : all(0.0f);
          save(to[c] + i, __builtin_convertvector(whole, Ints));
        }
      }
    }
  }

  // Y - 128, Cb and Cr of eight pixels.
  INLINE Ints luma_of(Ints r, Ints g, Ints b) { return ((r * 19595 + g * 38470 + b * 7471 + 32768) >> 16) - 128; }
  INLINE Ints cb_of(Ints r, Ints g, Ints b) { return (r * -11059 + g * -21709 + b * 32768 + kCentre) >> 16; }
  INLINE Ints cr_of(Ints r, Ints g, Ints b) { return (r * 32768 + g * -27439 + b * -5329 + kCentre) >> 16; }
  static constexpr int32_t kCentre = (128 << 16) + 32767;  // 32767, not 32768, in libjpeg

  void split_whole(int64_t m) {
    int32_t** planes = band(m);
    int32_t* const rgb[3] = {rows_[0], rows_[1], rows_[2]};
    for (int64_t row = 0; row < 8; ++row) {
      load_whole(m * 8 + row, rgb);
      for (int64_t i = 0; i < s_.wide; i += kLanes) {
        const Ints r = load(rgb[0] + i), g = load(rgb[1] + i), b = load(rgb[2] + i);
        const int64_t at = row * s_.wide + i;
        save(planes[0] + at, luma_of(r, g, b));
        save(planes[1] + at, cb_of(r, g, b) - 128);
        save(planes[2] + at, cr_of(r, g, b) - 128);
      }
    }
  }

  void split_half(int64_t m) {
    int32_t** planes = band(m);
    int32_t* const upper[3] = {rows_[0], rows_[1], rows_[2]};
    int32_t* const lower[3] = {rows_[3], rows_[4], rows_[5]};
    const Ints bias = {1, 2, 1, 2, 1, 2, 1, 2};
    for (int64_t row = 0; row < 8; ++row) {
      load_whole(m * 16 + 2 * row, upper);
      load_whole(m * 16 + 2 * row + 1, lower);
      int32_t* luma = planes[0] + 2 * row * s_.wide;
      for (int64_t i = 0; i < s_.wide; i += 2 * kLanes) {
        Ints cb[2], cr[2];
        for (int k = 0; k < 2; ++k) {
          const int64_t j = i + k * kLanes;
          const Ints r = load(upper[0] + j), g = load(upper[1] + j), b = load(upper[2] + j);
          const Ints r2 = load(lower[0] + j), g2 = load(lower[1] + j), b2 = load(lower[2] + j);
          save(luma + j, luma_of(r, g, b));
          save(luma + s_.wide + j, luma_of(r2, g2, b2));
          cb[k] = cb_of(r, g, b) + cb_of(r2, g2, b2);
          cr[k] = cr_of(r, g, b) + cr_of(r2, g2, b2);
        }
        const int64_t at = row * s_.cwide + i / 2;
        save(planes[1] + at, ((evens(cb[0], cb[1]) + odds(cb[0], cb[1]) + bias) >> 2) - 128);
        save(planes[2] + at, ((evens(cr[0], cr[1]) + odds(cr[0], cr[1]) + bias) >> 2) - 128);
      }
    }
    for (int64_t row = std::max<int64_t>(s_.ch - m * 8, 0); row < 8; ++row) {
      for (int p = 1; p < 3; ++p) {
        int32_t* to = planes[p] + row * s_.cwide;
        __builtin_memcpy(to, to - s_.cwide, s_.cwide * sizeof(int32_t));
      }
    }
  }

  INLINE void code_block(int32_t* block, int64_t stride, const ExactTable& t) {
    Ints v[8];
    for (int i = 0; i < 8; ++i) v[i] = load(block + i * stride);
    transpose(v);
    forward_pass<IntRules<11>>(v);
    transpose(v);
    forward_pass<IntRules<15>>(v);
    for (int i = 0; i < 8; ++i) {
      // floor((n + 0.5) * (1 / 8q)) in float32 is n / 8q for every n below 32768: all that can come.
      const Ints q = load(t.q + 8 * i), size = v[i] < 0 ? -v[i] : v[i];
      const Floats n = (__builtin_convertvector(size + 4 * q, Floats) + 0.5f) * load(t.inverse + 8 * i);
      const Ints k = __builtin_convertvector(n, Ints) * q;
      v[i] = v[i] < 0 ? -k : k;
    }
    inverse_pass<IntRules<11>>(v);
    transpose(v);
    inverse_pass<IntRules<18>>(v);
    transpose(v);
    for (int i = 0; i < 8; ++i) save(block + i * stride, clamped(v[i], all(-128), all(127)));
  }

  const int32_t* enlarged(int p, int64_t y, int32_t* to) {
    if (!s_.half) return chroma_row(p, y);
    const int64_t r = y / 2;
    const int32_t* near = chroma_row(p, r);
    if (!s_.smooth) {
      for (int64_t i = 0; i < s_.cwide; i += kLanes) save_alternating(to + 2 * i, load(near + i), load(near + i));
      return to;
    }
    const int32_t* far = chroma_row(p, std::clamp<int64_t>(y % 2 ? r + 1 : r - 1, 0, s_.ch - 1));
    int32_t* mid = rows_[6];
    for (int64_t i = 0; i < s_.cwide; i += kLanes) save(mid + i, load(near + i) * 3 + load(far + i));
    mid[-1] = mid[0];
    mid[s_.cw] = mid[s_.cw - 1];
    for (int64_t i = 0; i < s_.cwide; i += kLanes) {
      const Ints v = load(mid + i) * 3;
      save_alternating(to + 2 * i, (v + load(mid + i - 1) + 8) >> 4, (v + load(mid + i + 1) + 7) >> 4);
    }
    return to;
  }

  void emit(int64_t y) {
    const int32_t* luma = luma_row(y);
    const int32_t* cb_row = enlarged(1, y, rows_[0]);
    const int32_t* cr_row = enlarged(2, y, rows_[1]);
    for (int64_t i = 0; i < s_.wide; i += kLanes) {
      const Ints y8 = load(luma + i) + 128, cb = load(cb_row + i), cr = load(cr_row + i);
      put(0, i, y8 + ((cr * 91881 + 32768) >> 16));
      put(1, i, y8 + ((cb * -22554 + cr * -46802 + 32768) >> 16));
      put(2, i, y8 + ((cb * 116130 + 32768) >> 16));
    }
    store_rows<T>(call_.out, at_.sample, y, s_.w, pixels_);
  }

  INLINE void put_into(T* to, Ints v, float scale, float shift) {
    v = clamped(v, all(0), all(255));
    if constexpr (sizeof(T) == 1) {
      for (int k = 0; k < kLanes; ++k) to[k] = T(v[k]);
    } else {
      save(to, (__builtin_convertvector(v, Floats) - shift) / scale);
    }
  }
  void put(int c, int64_t i, Ints v) { put_into(pixels_[c] + i, v, call_.affine[c], call_.affine[3 + c]); }

  const JpegCall& call_;
  const Sizes& s_;
  const Stretch at_;
  const ExactTable luma_, chroma_;
  Scratch scratch_;
  int32_t* bands_[2][3];
  int32_t* rows_[7];
  T* pixels_[3];
};

static void exact_forward(const JpegCall& call, const Sizes& sizes, const Stretch& stretch) {
  if (call.bytes) {
    Exact<uint8_t>(call, sizes, stretch).forward();
  } else {
    Exact<float>(call, sizes, stretch).forward();
  }
}
