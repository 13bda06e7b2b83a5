// The PGD step in place, and the random start. Source: Madry et al. 2018; semantics: poisonshield/ops/pgd/reference.py.
//
// linf reads x, grad and x0 and writes x: 16 bytes an element. l2 and sign_l2 take two passes: sums of v v, v d and d d
// (v the direction, d = x - x0, in pixel units, float64) per chunk, then the step, for whose length they suffice:
// |d|^2 + 2 a <d, v> + a^2 |v|^2. The start in a ball draws its Gaussian direction twice, once for its length, and stores
// nothing between. Partial sums are added in a fixed order; no atomics. Where a product is followed by a sum whose bits
// matter, both are rounded: the start must equal the reference.
//
// A sample is one run in the order of memory, whatever the order of dimensions: an element's channel follows from its
// place. Each thread takes 128 bits of x at once (kWide), or single elements where the run is not aligned.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "normal.cuh"
#include "packs.cuh"
#include "philox.cuh"

namespace poisonshield {
namespace {

// What all kernels take. [B]: one number a sample, or null where the one beside it serves all.
struct Call {
  const float *step, *eps;  // [B], in pixel units
  float step_number, eps_number;
  const float *mean, *std;       // [C], or null where x holds pixels
  const uint8_t *mask, *active;  // [B, count] and [B], or null
  float low, high;               // least and greatest pixel
  uint32_t count, chunks;        // elements and blocks of a sample
  uint32_t channels, channel_step;  // place i is of channel i / channel_step % channels
  uint32_t columns;  // place i is element i % columns * (count / columns) + i / columns in row-major order
  bool mixed;        // whether the elements of a thread may be of several channels
};

// Where in Philox's numbers a start lies.
struct Draw {
  const int64_t *seed, *offset, *stream;  // or null where the number below serves
  int64_t seed_number, offset_number, stream_number;
  const int64_t* ids;  // [B]
  __device__ __forceinline__ Stream of(int64_t b) const {
    return {seed != nullptr ? *seed : seed_number, offset != nullptr ? *offset : offset_number, ids[b],
            stream != nullptr ? *stream : stream_number};
  }
};

struct Limits {
  float std, mean, low, high, step, reach;  // the last four in the space of x
};

__device__ __forceinline__ Limits limits(const Call& c, int64_t b, uint32_t place) {
  const float step = c.step != nullptr ? c.step[b] : c.step_number, eps = c.eps != nullptr ? c.eps[b] : c.eps_number;
  if (c.std == nullptr) return {1.0f, 0.0f, c.low, c.high, step, eps};
  const uint32_t channel = place / c.channel_step % c.channels;
  const float mean = c.mean[channel], std = c.std[channel];
  return {std, mean, __fdiv_rn(c.low - mean, std), __fdiv_rn(c.high - mean, std), __fdiv_rn(step, std), __fdiv_rn(eps, std)};
}

template <class O>
__device__ __forceinline__ float original(float x0, const Limits& l) {
  return sizeof(O) == 1 ? __fdiv_rn(__fdiv_rn(x0, 255.0f) - l.mean, l.std) : x0;
}

// NaN in v stays, as in torch.minimum and torch.maximum.
__device__ __forceinline__ float clip(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

__device__ __forceinline__ float sign(float g) { return float(g > 0.0f) - float(g < 0.0f); }

// All elements count where there is no mask.
template <class T, class Where>
__device__ __forceinline__ void load_mask(uint8_t (&free)[kEach<T>], const Call& c, const Where& at, int64_t base) {
#pragma unroll
  for (int k = 0; k < kEach<T>; ++k) free[k] = 1;
  if (c.mask != nullptr) at.load(free, c.mask + base);
}

// x moved to `moved` but never out of the box, x0 where masked.
template <class T>
__device__ __forceinline__ T boxed(float moved, float origin, uint8_t free, const Limits& l) {
  const float low = clip(origin - l.reach, l.low, l.high), high = clip(origin + l.reach, l.low, l.high);
  return stored<T>(!free || isnan(origin) ? origin : clip(moved, low, high), low, high);
}

// The same where the ball is what bounds it: half precision is rounded to the side of x0.
template <class T>
__device__ __forceinline__ T clipped(float moved, float origin, uint8_t free, const Limits& l) {
  const float next = free ? clip(moved, l.low, l.high) : origin;
  return stored<T>(next, fminf(next, origin), fmaxf(next, origin));
}

template <class T, class G, class O, bool kWide>
__global__ void __launch_bounds__(kThreads) linf_step(
    T* __restrict__ x, const G* __restrict__ grad, const O* __restrict__ x0, const Call c) {
  const int64_t b = blockIdx.x / c.chunks, base = b * c.count;
  if (c.active != nullptr && !c.active[b]) return;
  const Places<T, kWide> at(blockIdx.x % c.chunks, c.count);
  float from[kEach<T>], g[kEach<T>], clean[kEach<T>];
  uint8_t free[kEach<T>];
  T to[kEach<T>];
  at.load(from, x + base), at.load(g, grad + base), at.load(clean, x0 + base);
  load_mask<T>(free, c, at, base);
  Limits l;
#pragma unroll
  for (int k = 0; k < kEach<T>; ++k) {
    if (!at.has(k)) break;
    if (k == 0 || c.mixed) l = limits(c, b, at[k]);
    const float origin = original<O>(clean[k], l);
    to[k] = boxed<T>(from[k] + l.step * sign(g[k]), origin, free[k], l);
  }
  at.store(to, x + base);
}

template <class T, class O, bool kWide>
__global__ void __launch_bounds__(kThreads) linf_start(
    T* __restrict__ x, const O* __restrict__ x0, const Draw draw, const Call c) {
  const int64_t b = blockIdx.x / c.chunks, base = b * c.count;
  const Places<T, kWide> at(blockIdx.x % c.chunks, c.count);
  const Stream stream = draw.of(b);
  const uint32_t rows = c.count / c.columns;
  float clean[kEach<T>];
  uint8_t free[kEach<T>];
  T to[kEach<T>];
  at.load(clean, x0 + base);
  load_mask<T>(free, c, at, base);
  Limits l;
  Words words;
#pragma unroll
  for (int k = 0; k < kEach<T>; ++k) {
    if (!at.has(k)) break;
    if (k == 0 || c.mixed) l = limits(c, b, at[k]);
    float u;
    if (kWide && c.columns == 1) {  // neighbours share a block of four words
      if (k % 4 == 0) words = philox(stream, at[k] / 4);
      u = uniform(words.w[k % 4]);
    } else {
      u = uniform_at(stream, at[k] % c.columns * rows + at[k] / c.columns);
    }
    const float origin = original<O>(clean[k], l), delta = __fmul_rn(__fsub_rn(__fmul_rn(u, 2.0f), 1.0f), l.reach);
    to[k] = boxed<T>(__fadd_rn(origin, delta), origin, free[k], l);
  }
  at.store(to, x + base);
}

// Where to go, in pixel units; 0 under the mask.
__device__ __forceinline__ float direction(float g, uint8_t free, bool signs, const Limits& l) {
  return !free ? 0.0f : signs ? sign(g) : __fdiv_rn(g, l.std);
}

template <class T, class G, class O, bool kWide>
__global__ void __launch_bounds__(kThreads) ball_sums(
    const T* __restrict__ x, const G* __restrict__ grad, const O* __restrict__ x0, double* __restrict__ sums, bool signs,
    const Call c) {
  const int64_t b = blockIdx.x / c.chunks, base = b * c.count;
  const Places<T, kWide> at(blockIdx.x % c.chunks, c.count);
  float from[kEach<T>], g[kEach<T>], clean[kEach<T>];
  uint8_t free[kEach<T>];
  at.load(from, x + base), at.load(g, grad + base), at.load(clean, x0 + base);
  load_mask<T>(free, c, at, base);
  double vv = 0, vd = 0, dd = 0;
  Limits l;
#pragma unroll
  for (int k = 0; k < kEach<T>; ++k) {
    if (!at.has(k)) break;
    if (k == 0 || c.mixed) l = limits(c, b, at[k]);
    const double v = direction(g[k], free[k], signs, l), d = free[k] ? (from[k] - original<O>(clean[k], l)) * l.std : 0.0f;
    vv += v * v;
    vd += v * d;
    dd += d * d;
  }
  vv = block_sum(vv), vd = block_sum(vd), dd = block_sum(dd);
  if (threadIdx.x == 0) {
    double* out = sums + int64_t(blockIdx.x) * 3;
    out[0] = vv, out[1] = vd, out[2] = dd;
  }
}

// The sum of number `which` of `kNumbers` over the chunks of a sample. Every thread gets it.
template <int kNumbers>
__device__ __forceinline__ double total(const double* __restrict__ sums, const Call& c, int64_t b, int which) {
  double sum = 0;
  for (uint32_t i = threadIdx.x; i < c.chunks; i += kThreads) sum += sums[(b * c.chunks + i) * kNumbers + which];
  return block_sum(sum);
}

template <class T, class G, class O, bool kWide>
__global__ void __launch_bounds__(kThreads) ball_step(
    T* __restrict__ x, const G* __restrict__ grad, const O* __restrict__ x0, const double* __restrict__ sums, bool signs,
    const Call c) {
  const int64_t b = blockIdx.x / c.chunks, base = b * c.count;
  if (c.active != nullptr && !c.active[b]) return;
  const Places<T, kWide> at(blockIdx.x % c.chunks, c.count);
  float from[kEach<T>], g[kEach<T>], clean[kEach<T>];
  uint8_t free[kEach<T>];
  T to[kEach<T>];
  at.load(from, x + base), at.load(g, grad + base), at.load(clean, x0 + base);
  load_mask<T>(free, c, at, base);
  const double vv = total<3>(sums, c, b, 0), vd = total<3>(sums, c, b, 1), dd = total<3>(sums, c, b, 2);
  const float eps = c.eps != nullptr ? c.eps[b] : c.eps_number;
  double scale = c.step != nullptr ? c.step[b] : c.step_number;
  if (!signs) scale = vv > 0 && isfinite(vv) ? scale / sqrt(vv) : 0.0;
  const double moved = scale != 0 ? dd + 2 * scale * vd + scale * scale * vv : dd;
  const double length = sqrt(moved > 0 ? moved : (isnan(moved) ? moved : 0.0));
  const float shrink = length > eps ? float(eps / length) : 1.0f;
  Limits l;
#pragma unroll
  for (int k = 0; k < kEach<T>; ++k) {
    if (!at.has(k)) break;
    if (k == 0 || c.mixed) l = limits(c, b, at[k]);
    const float origin = original<O>(clean[k], l);
    float d = (from[k] - origin) * l.std;
    if (scale != 0) d += float(direction(g[k], free[k], signs, l) * scale);
    to[k] = clipped<T>(origin + __fdiv_rn(d * shrink, l.std), origin, free[k], l);
  }
  at.store(to, x + base);
}

// Squares of the noise, and how many elements are free: what the length of a direction follows from.
__global__ void __launch_bounds__(kThreads) noise_sums(double* __restrict__ sums, const Draw draw, const Call c) {
  const int64_t b = blockIdx.x / c.chunks;
  const Places<float, false> at(blockIdx.x % c.chunks, c.count);
  const Stream stream = draw.of(b);
  const uint32_t rows = c.count / c.columns;
  double square = 0, count = 0;
  for (int k = 0; k < kEach<float>; ++k) {
    if (!at.has(k) || (c.mask != nullptr && !c.mask[b * c.count + at[k]])) continue;
    const double noise = normal_at(stream, at[k] % c.columns * rows + at[k] / c.columns, c.count);
    square += noise * noise;
    count += 1;
  }
  square = block_sum(square), count = block_sum(count);
  if (threadIdx.x == 0) sums[blockIdx.x * 2] = square, sums[blockIdx.x * 2 + 1] = count;
}

template <class T, class O>
__global__ void __launch_bounds__(kThreads) ball_start(
    T* __restrict__ x, const O* __restrict__ x0, const double* __restrict__ sums, const Draw draw, const Call c) {
  const int64_t b = blockIdx.x / c.chunks, base = b * c.count;
  const Places<float, false> at(blockIdx.x % c.chunks, c.count);
  const Stream stream = draw.of(b);
  const uint32_t rows = c.count / c.columns;
  const double square = total<2>(sums, c, b, 0), count = total<2>(sums, c, b, 1);
  const float u = uniform_at({stream.seed, stream.offset, stream.id, stream.stream + 1}, 0);
  const float eps = c.eps != nullptr ? c.eps[b] : c.eps_number;
  const float radius = eps * powf(u, 1.0f / float(count > 1 ? count : 1.0)), length = fmaxf(float(sqrt(square)), 1e-12f);
  for (int k = 0; k < kEach<float>; ++k) {
    if (!at.has(k)) break;
    const Limits l = limits(c, b, at[k]);
    const float noise = normal_at(stream, at[k] % c.columns * rows + at[k] / c.columns, c.count);
    const float origin = original<O>(value(x0[base + at[k]]), l);
    const uint8_t free = c.mask == nullptr || c.mask[base + at[k]];
    x[base + at[k]] = clipped<T>(origin + __fdiv_rn(noise * (radius / length), l.std), origin, free, l);
  }
}

using Types = torch::headeronly::ScalarType;

template <class T>
struct Of {
  using type = T;
};

// run(Of<T>, Of<G>, Of<O>) for x of T, gradients of G and originals of O: float32 everything, or originals in bytes; half
// precision everything, or beside float32.
template <class Run>
void by_types(const Tensor& x, const Tensor& x0, const Run& run) {
  const Types kind = x.scalar_type(), clean = x0.scalar_type();
  if (kind == Types::Float && clean == Types::Float) return run(Of<float>(), Of<float>(), Of<float>());
  if (kind == Types::Float && clean == Types::Byte) return run(Of<float>(), Of<float>(), Of<uint8_t>());
  const bool alike = kind == clean;
  STD_TORCH_CHECK(alike || clean == Types::Float, "poisonshield: these types of x and x0 are not compiled");
  if (kind == Types::BFloat16) {
    return alike ? run(Of<__nv_bfloat16>(), Of<__nv_bfloat16>(), Of<__nv_bfloat16>())
                 : run(Of<__nv_bfloat16>(), Of<float>(), Of<float>());
  }
  STD_TORCH_CHECK(kind == Types::Half, "poisonshield: x is neither float32 nor half precision");
  alike ? run(Of<__half>(), Of<__half>(), Of<__half>()) : run(Of<__half>(), Of<float>(), Of<float>());
}

// Whether each sample can be read 16 bytes of x at a time.
template <class T>
bool is_wide(const Call& c, std::initializer_list<const void*> pointers) {
  bool wide = c.count % kEach<T> == 0;
  for (const void* p : pointers) wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return wide;
}

Call call_of(
    const Tensor& x, const Optional& step, double step_number, const Optional& eps, double eps_number, const Optional& mean,
    const Optional& std, const Optional& mask, const Optional& active, double low, double high, int64_t channel_step,
    int64_t columns) {
  const int64_t count = x.numel() / x.size(0), channels = x.size(1);
  return {data<float>(step), data<float>(eps), float(step_number), float(eps_number), data<float>(mean), data<float>(std),
          data<uint8_t>(mask), data<uint8_t>(active), float(low), float(high), uint32_t(count), 0, uint32_t(channels),
          uint32_t(channel_step), uint32_t(columns), false};
}

// Complete the call for x of T: blocks, and whether its threads may meet several channels. Gives the grid.
template <class T>
uint32_t divide(Call& c, const Tensor& x, bool wide) {
  c.chunks = uint32_t(ceil_div(c.count, kThreads * kEach<T>));
  c.mixed = c.std != nullptr && !(wide && c.channel_step % kEach<T> == 0);
  return uint32_t(x.size(0) * c.chunks);
}

void linf_step_cuda(
    Tensor x, const Tensor& grad, const Tensor& x0, const Optional& step, double step_number, const Optional& eps,
    double eps_number, const Optional& mean, const Optional& std, const Optional& mask, const Optional& active, double low,
    double high, int64_t channel_step) {
  check_devices(x, grad, x0, step, eps, mean, std, mask, active);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call c = call_of(x, step, step_number, eps, eps_number, mean, std, mask, active, low, high, channel_step, 1);
  by_types(x, x0, [&]<class T, class G, class O>(Of<T>, Of<G>, Of<O>) {
    const bool wide = is_wide<T>(c, {x.const_data_ptr(), grad.const_data_ptr(), x0.const_data_ptr(), c.mask});
    const uint32_t grid = divide<T>(c, x, wide);
    const auto kernel = wide ? linf_step<T, G, O, true> : linf_step<T, G, O, false>;
    kernel<<<grid, kThreads, 0, stream_of(x)>>>(writable<T>(x), data<G>(grad), data<O>(x0), c);
  });
  check_launch();
}

void ball_step_cuda(
    Tensor x, const Tensor& grad, const Tensor& x0, const Optional& step, double step_number, const Optional& eps,
    double eps_number, const Optional& mean, const Optional& std, const Optional& mask, const Optional& active, Tensor sums,
    double low, double high, int64_t channel_step, bool signs) {
  check_devices(x, grad, x0, step, eps, mean, std, mask, active, sums);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call c = call_of(x, step, step_number, eps, eps_number, mean, std, mask, active, low, high, channel_step, 1);
  by_types(x, x0, [&]<class T, class G, class O>(Of<T>, Of<G>, Of<O>) {
    const bool wide = is_wide<T>(c, {x.const_data_ptr(), grad.const_data_ptr(), x0.const_data_ptr(), c.mask});
    const uint32_t grid = divide<T>(c, x, wide);
    STD_TORCH_CHECK(sums.numel() >= grid * 3LL, "sums has ", sums.numel(), " numbers, and ", grid * 3LL, " are needed");
    const auto first = wide ? ball_sums<T, G, O, true> : ball_sums<T, G, O, false>;
    const auto second = wide ? ball_step<T, G, O, true> : ball_step<T, G, O, false>;
    first<<<grid, kThreads, 0, stream_of(x)>>>(data<T>(x), data<G>(grad), data<O>(x0), writable<double>(sums), signs, c);
    second<<<grid, kThreads, 0, stream_of(x)>>>(writable<T>(x), data<G>(grad), data<O>(x0), data<double>(sums), signs, c);
  });
  check_launch();
}

void linf_start_cuda(
    Tensor x, const Tensor& x0, const Optional& eps, double eps_number, const Optional& seed, int64_t seed_number,
    const Optional& offset, int64_t offset_number, const Optional& stream, int64_t stream_number, const Tensor& ids,
    const Optional& mean, const Optional& std, const Optional& mask, double low,
    double high, int64_t channel_step, int64_t columns) {
  check_devices(x, x0, eps, seed, offset, ids, stream, mean, std, mask);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call c = call_of(x, std::nullopt, 0, eps, eps_number, mean, std, mask, std::nullopt, low, high, channel_step, columns);
  const Draw draw{data<int64_t>(seed), data<int64_t>(offset), data<int64_t>(stream), seed_number, offset_number,
                  stream_number, data<int64_t>(ids)};
  by_types(x, x0, [&]<class T, class G, class O>(Of<T>, Of<G>, Of<O>) {
    const bool wide = is_wide<T>(c, {x.const_data_ptr(), x0.const_data_ptr(), c.mask});
    const uint32_t grid = divide<T>(c, x, wide);
    const auto kernel = wide ? linf_start<T, O, true> : linf_start<T, O, false>;
    kernel<<<grid, kThreads, 0, stream_of(x)>>>(writable<T>(x), data<O>(x0), draw, c);
  });
  check_launch();
}

void ball_start_cuda(
    Tensor x, const Tensor& x0, const Optional& eps, double eps_number, const Optional& seed, int64_t seed_number,
    const Optional& offset, int64_t offset_number, const Optional& stream, int64_t stream_number, const Tensor& ids,
    const Optional& mean, const Optional& std, const Optional& mask, Tensor sums,
    double low, double high, int64_t channel_step, int64_t columns) {
  check_devices(x, x0, eps, seed, offset, ids, stream, mean, std, mask, sums);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call c = call_of(x, std::nullopt, 0, eps, eps_number, mean, std, mask, std::nullopt, low, high, channel_step, columns);
  const Draw draw{data<int64_t>(seed), data<int64_t>(offset), data<int64_t>(stream), seed_number, offset_number,
                  stream_number, data<int64_t>(ids)};
  const uint32_t grid = divide<float>(c, x, false);
  STD_TORCH_CHECK(sums.numel() >= grid * 2LL, "sums has ", sums.numel(), " numbers, and ", grid * 2LL, " are needed");
  noise_sums<<<grid, kThreads, 0, stream_of(x)>>>(writable<double>(sums), draw, c);
  by_types(x, x0, [&]<class T, class G, class O>(Of<T>, Of<G>, Of<O>) {
    const auto kernel = ball_start<T, O>;
    kernel<<<grid, kThreads, 0, stream_of(x)>>>(writable<T>(x), data<O>(x0), data<double>(sums), draw, c);
  });
  check_launch();
}

}  // namespace
}  // namespace poisonshield

STABLE_TORCH_LIBRARY_IMPL(poisonshield_cuda, CUDA, m) {
  m.impl("linf_step_", TORCH_BOX(&poisonshield::linf_step_cuda));
  m.impl("ball_step_", TORCH_BOX(&poisonshield::ball_step_cuda));
  m.impl("linf_start_", TORCH_BOX(&poisonshield::linf_start_cuda));
  m.impl("ball_start_", TORCH_BOX(&poisonshield::ball_start_cuda));
}
