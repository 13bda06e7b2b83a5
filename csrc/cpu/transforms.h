// The 8-point cosine transform and its inverse over eight vectors (Loeffler et al. 1989), each sqrt(8) times the
// orthonormal one: in floats, and in libjpeg's integers (13-bit weights, a rounding shift by n bits at the end).
struct FloatRules {
  typedef Floats V;
  static constexpr float k0298 = 0.298631336425f, k0390 = 0.390180644032f, k0541 = 0.541196100146f;
  static constexpr float k0765 = 0.765366864730f, k0899 = 0.899976223136f, k1175 = 1.175875602419f;
  static constexpr float k1501 = 1.501321110453f, k1847 = 1.847759065023f, k1961 = 1.961570560807f;
  static constexpr float k2053 = 2.053119869073f, k2562 = 2.562915447742f, k3072 = 3.072711026846f;
  INLINE V lifted(V v) { return v; }
  INLINE V finished(V v) { return v; }
};

template <int kBits>
struct IntRules {
  typedef Ints V;
  static constexpr int32_t k0298 = 2446, k0390 = 3196, k0541 = 4433, k0765 = 6270, k0899 = 7373, k1175 = 9633;
  static constexpr int32_t k1501 = 12299, k1847 = 15137, k1961 = 16069, k2053 = 16819, k2562 = 20995, k3072 = 25172;
  INLINE V lifted(V v) { return v * 8192; }
  INLINE V finished(V v) { return (v + (1 << (kBits - 1))) >> kBits; }
};

// The odd half, shared by both directions: a, b, c, d become what belongs to inputs 7, 5, 3, 1.
template <class R, class V>
INLINE void odd_half(V& a, V& b, V& c, V& d) {
  const V z5 = (a + c + b + d) * R::k1175;
  const V z1 = (a + d) * -R::k0899, z2 = (b + c) * -R::k2562;
  const V z3 = (a + c) * -R::k1961 + z5, z4 = (b + d) * -R::k0390 + z5;
  a = a * R::k0298 + z1 + z3;
  b = b * R::k2053 + z2 + z4;
  c = c * R::k3072 + z2 + z3;
  d = d * R::k1501 + z1 + z4;
}

template <class R, class V>
INLINE void forward_pass(V (&v)[8]) {
  const V s0 = v[0] + v[7], s1 = v[1] + v[6], s2 = v[2] + v[5], s3 = v[3] + v[4];
  V a = v[3] - v[4], b = v[2] - v[5], c = v[1] - v[6], d = v[0] - v[7];
  const V t10 = s0 + s3, t13 = s0 - s3, t11 = s1 + s2, t12 = s1 - s2;
  const V z = (t12 + t13) * R::k0541;
  odd_half<R>(a, b, c, d);
  v[0] = R::finished(R::lifted(t10 + t11));
  v[1] = R::finished(d);
  v[2] = R::finished(z + t13 * R::k0765);
  v[3] = R::finished(c);
  v[4] = R::finished(R::lifted(t10 - t11));
  v[5] = R::finished(b);
  v[6] = R::finished(z - t12 * R::k1847);
  v[7] = R::finished(a);
}

template <class R, class V>
INLINE void inverse_pass(V (&v)[8]) {
  const V z = (v[2] + v[6]) * R::k0541;
  const V t2 = z - v[6] * R::k1847, t3 = z + v[2] * R::k0765;
  const V t0 = R::lifted(v[0] + v[4]), t1 = R::lifted(v[0] - v[4]);
  const V e0 = t0 + t3, e1 = t1 + t2, e2 = t1 - t2, e3 = t0 - t3;
  V a = v[7], b = v[5], c = v[3], d = v[1];
  odd_half<R>(a, b, c, d);
  v[0] = R::finished(e0 + d);
  v[1] = R::finished(e1 + c);
  v[2] = R::finished(e2 + b);
  v[3] = R::finished(e3 + a);
  v[4] = R::finished(e3 - a);
  v[5] = R::finished(e2 - b);
  v[6] = R::finished(e1 - c);
  v[7] = R::finished(e0 - d);
}
