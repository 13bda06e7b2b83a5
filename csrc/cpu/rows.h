// Rows of pixels, from tensors of any strides and back, and the steps of a row that both modes share. Included once for
// each level.

// w elements of three channels into rows of T, the last one repeated up to `wide`.
template <class T>
INLINE void load_rows(const Pixels& from, int64_t sample, int64_t y, int64_t w, int64_t wide, T* const (&rows)[3]) {
  const int64_t* s = from.strides;
  const T* start = static_cast<const T*>(from.data) + sample * s[0] + y * s[2];
  if (s[3] == 3 && s[1] == 1) {  // channels last
    for (int64_t i = 0; i < w; ++i) {
      for (int c = 0; c < 3; ++c) rows[c][i] = start[3 * i + c];
    }
  } else {
    for (int c = 0; c < 3; ++c) {
      const T* p = start + c * s[1];
      if (s[3] == 1) {
        __builtin_memcpy(rows[c], p, w * sizeof(T));
      } else {
        for (int64_t i = 0; i < w; ++i) rows[c][i] = p[i * s[3]];
      }
    }
  }
  for (int c = 0; c < 3; ++c) {
    for (int64_t i = w; i < wide; ++i) rows[c][i] = rows[c][w - 1];
  }
}

template <class T>
INLINE void store_rows(const Pixels& to, int64_t sample, int64_t y, int64_t w, T* const (&rows)[3]) {
  const int64_t* s = to.strides;
  T* start = static_cast<T*>(to.data) + sample * s[0] + y * s[2];
  if (s[3] == 3 && s[1] == 1) {
    for (int64_t i = 0; i < w; ++i) {
      for (int c = 0; c < 3; ++c) start[3 * i + c] = rows[c][i];
    }
    return;
  }
  for (int c = 0; c < 3; ++c) {
    T* p = start + c * s[1];
    if (s[3] == 1) {
      __builtin_memcpy(p, rows[c], w * sizeof(T));
    } else {
      for (int64_t i = 0; i < w; ++i) p[i * s[3]] = rows[c][i];
    }
  }
}

// Memory of one thread: arrays of whole vectors, a vector's room at either end of each.
class Scratch {
 public:
  float* take(int64_t count) {
    arrays_.emplace_back(count + 2 * kLanes, 0.0f);
    return arrays_.back().data() + kLanes;
  }
  int32_t* take_ints(int64_t count) { return reinterpret_cast<int32_t*>(take(count)); }

 private:
  std::vector<std::vector<float>> arrays_;
};

// The way down a stretch: code(m, whether its luminance is needed) for each band, and emit(y) for each row of pixels as
// soon as the chrominance below it is there.
template <class Code, class Emit>
static void walk(const Sizes& s, const Stretch& at, const Code& code, const Emit& emit) {
  const int64_t last = std::min(s.bands, at.last + s.halo);
  for (int64_t m = std::max<int64_t>(0, at.first - s.halo); m < last; ++m) {
    code(m, m >= at.first && m < at.last);
    const int64_t done = m == s.bands - 1 ? s.h : (m + 1) * s.rows - s.halo, end = std::min(at.last * s.rows, done);
    for (int64_t y = std::max(at.first * s.rows, m * s.rows - s.halo); y < end; ++y) emit(y);
  }
}
