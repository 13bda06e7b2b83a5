// Eight floats or integers at a time, in the vector language that GCC and clang share. Included once for each level.
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

constexpr int64_t kLanes = 8;

INLINE Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE Ints load(const int32_t* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE void save(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void save(int32_t* p, Ints v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE Floats all(float value) { return Floats{} + value; }
INLINE Ints all(int32_t value) { return Ints{} + value; }

// NaN stays.
template <class V>
INLINE V clamped(V v, V low, V high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Truncated where the value fits an integer; greater ones are whole, and NaN stays.
INLINE Floats truncated(Floats v) {
  const Floats whole = __builtin_convertvector(__builtin_convertvector(v, Ints), Floats);
  return (v < 8388608.0f) & (v > -8388608.0f) ? whole : v;
}

INLINE Floats floored(Floats v) {
  const Floats t = truncated(v);
  return t > v ? t - 1.0f : t;
}

// v of eight vectors becomes its transpose.
template <class V>
INLINE void transpose(V (&v)[8]) {
  V t[8], s[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      s[i + 2 * k] = SHUFFLE(t[i + k], t[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      s[i + 2 * k + 1] = SHUFFLE(t[i + k], t[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = SHUFFLE(s[i], s[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = SHUFFLE(s[i], s[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Of 16 neighbours a, b: those at even places, those at odd ones; and the way back.
template <class V>
INLINE V evens(V a, V b) {
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
template <class V>
INLINE V odds(V a, V b) {
  return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
template <class T, class V>
INLINE void save_alternating(T* p, V even, V odd) {
  save(p, V(SHUFFLE(even, odd, 0, 8, 1, 9, 2, 10, 3, 11)));
  save(p + kLanes, V(SHUFFLE(even, odd, 4, 12, 5, 13, 6, 14, 7, 15)));
}
