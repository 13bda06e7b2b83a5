// CUDA's small vectors. Aligned as on the device, so that -fsanitize=alignment tells of a load that a GPU refuses.
#pragma once
#include <stdint.h>

#define EMULATE_VECTORS(T, name, one, two, four)                            \
  struct alignas(two) name##2 {                                             \
    T x, y;                                                                 \
  };                                                                        \
  struct name##3 {                                                          \
    T x, y, z;                                                              \
  };                                                                        \
  struct alignas(four) name##4 {                                            \
    T x, y, z, w;                                                           \
  };                                                                        \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }        \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATE_VECTORS(float, float, 4, 8, 16)
EMULATE_VECTORS(int, int, 4, 8, 16)
EMULATE_VECTORS(short, short, 2, 4, 8)
EMULATE_VECTORS(unsigned short, ushort, 2, 4, 8)
EMULATE_VECTORS(signed char, char, 1, 2, 4)
EMULATE_VECTORS(unsigned char, uchar, 1, 2, 4)
#undef EMULATE_VECTORS

struct alignas(8) uint2 {  // uint3 is that of threadIdx
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
