// The PGD step in place, and the random start. Source: Madry et al. 2018; semantics: poisonshield/ops/pgd/reference.py.
//
// linf reads x, grad and x0 and writes x: 16 bytes an element. l2 and sign_l2 take two passes: sums of v v, v d and d d
// (v the direction, d = x - x0, in pixel units, float64) per chunk, then the step, for whose length they suffice:
// |d|^2 + 2 a <d, v> + a^2 |v|^2. Partial sums are added in a fixed order; no atomics. Where a product is followed by a sum
// whose bits matter, both are rounded: the start must equal the reference.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "philox.cuh"

namespace poisonshield {
namespace {

constexpr int kEach = 4;                  // elements of a thread
constexpr int kChunk = kThreads * kEach;  // elements of a block

struct Space {
  const float *mean, *std;
  const uint8_t *mask, *active;
  float low, high;
  int64_t channels, inner, chunks;
};

struct Limits {
  float std, mean, low, high;
};

__device__ __forceinline__ Limits limits(const Space& s, int64_t channel) {
  if (s.std == nullptr) return {1.0f, 0.0f, s.low, s.high};
  const float mean = s.mean[channel], std = s.std[channel];
  return {std, mean, (s.low - mean) / std, (s.high - mean) / std};
}

template <bool kBytes>
__device__ __forceinline__ float original(const void* x0, int64_t at, const Limits& l) {
  if constexpr (kBytes) {
    return (static_cast<const uint8_t*>(x0)[at] / 255.0f - l.mean) / l.std;
  } else {
    return static_cast<const float*>(x0)[at];
  }
}

// NaN in v stays, as in torch.minimum and torch.maximum.
__device__ __forceinline__ float clip(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

__device__ __forceinline__ float sign(float g) { return float(g > 0.0f) - float(g < 0.0f); }

template <bool kBytes>
__global__ void __launch_bounds__(kThreads) linf_step(
    float* __restrict__ x, const float* __restrict__ grad, const void* __restrict__ x0, const float* __restrict__ step,
    const float* __restrict__ eps, Space s) {
  const int64_t row = blockIdx.x / s.chunks, b = row / s.channels;
  if (s.active != nullptr && !s.active[b]) return;
  const Limits l = limits(s, row % s.channels);
  const float stride = step[b] / l.std, reach = eps[b] / l.std;
  const int64_t start = (blockIdx.x % s.chunks) * kChunk + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = start + k * kThreads, at = row * s.inner + i;
    if (i >= s.inner) break;
    const float origin = original<kBytes>(x0, at, l);
    float moved = x[at] + stride * sign(grad[at]);
    const float low = clip(origin - reach, l.low, l.high), high = clip(origin + reach, l.low, l.high);
    moved = isnan(origin) ? origin : clip(moved, low, high);
    x[at] = s.mask != nullptr && !s.mask[at] ? origin : moved;
  }
}

template <bool kBytes>
__global__ void __launch_bounds__(kThreads) linf_start(
    float* __restrict__ x, const void* __restrict__ x0, const float* __restrict__ eps, const int64_t* seed,
    const int64_t* offset, const int64_t* ids, const int64_t* stream, Space s) {
  // A thread draws one block of four words, for four neighbouring elements of a sample.
  const int64_t b = blockIdx.x / s.chunks, count = s.inner * s.channels;
  const int64_t block = (blockIdx.x % s.chunks) * kThreads + threadIdx.x;
  const Words words = philox({*seed, *offset, ids[b], *stream}, uint32_t(block));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t i = block * 4 + k, at = b * count + i;
    if (i >= count) break;
    const Limits l = limits(s, uint32_t(i) / uint32_t(s.inner));  // 64-bit division would need a stack
    const float origin = original<kBytes>(x0, at, l), u = uniform(words.w[k]);
    const float delta = __fmul_rn(__fsub_rn(__fmul_rn(u, 2.0f), 1.0f), __fdiv_rn(eps[b], l.std));
    const float moved = clip(__fadd_rn(origin, delta), l.low, l.high);
    x[at] = s.mask != nullptr && !s.mask[at] ? origin : moved;
  }
}

template <bool kSign>
__device__ __forceinline__ float direction(const float* grad, const Space& s, int64_t at, const Limits& l) {
  if (s.mask != nullptr && !s.mask[at]) return 0.0f;
  return kSign ? sign(grad[at]) : grad[at] / l.std;
}

template <bool kBytes, bool kSign>
__global__ void __launch_bounds__(kThreads) ball_sums(
    const float* __restrict__ x, const float* __restrict__ grad, const void* __restrict__ x0, double* __restrict__ sums,
    Space s) {
  const int64_t row = blockIdx.x / s.chunks;
  const Limits l = limits(s, row % s.channels);
  const int64_t start = (blockIdx.x % s.chunks) * kChunk + threadIdx.x;
  double vv = 0, vd = 0, dd = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = start + k * kThreads, at = row * s.inner + i;
    if (i >= s.inner || (s.mask != nullptr && !s.mask[at])) continue;
    const double v = direction<kSign>(grad, s, at, l), d = (x[at] - original<kBytes>(x0, at, l)) * l.std;
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

template <bool kBytes, bool kSign>
__global__ void __launch_bounds__(kThreads) ball_step(
    float* __restrict__ x, const float* __restrict__ grad, const void* __restrict__ x0, const float* __restrict__ step,
    const float* __restrict__ eps, const double* __restrict__ sums, Space s) {
  const int64_t row = blockIdx.x / s.chunks, b = row / s.channels;
  if (s.active != nullptr && !s.active[b]) return;
  double vv = 0, vd = 0, dd = 0;
  const int64_t parts = s.channels * s.chunks;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
    const double* part = sums + (b * parts + i) * 3;
    vv += part[0], vd += part[1], dd += part[2];
  }
  vv = block_sum(vv), vd = block_sum(vd), dd = block_sum(dd);
  double scale = step[b];
  if (!kSign) scale = vv > 0 && isfinite(vv) ? scale / sqrt(vv) : 0.0;
  const double moved = scale != 0 ? dd + 2 * scale * vd + scale * scale * vv : dd;
  const double length = sqrt(moved > 0 ? moved : (isnan(moved) ? moved : 0.0));
  const float shrink = length > eps[b] ? float(eps[b] / length) : 1.0f;
  const Limits l = limits(s, row % s.channels);
  const int64_t start = (blockIdx.x % s.chunks) * kChunk + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = start + k * kThreads, at = row * s.inner + i;
    if (i >= s.inner) break;
    const float origin = original<kBytes>(x0, at, l);
    float d = (x[at] - origin) * l.std;
    if (scale != 0) d += float(direction<kSign>(grad, s, at, l) * scale);
    const float next = clip(origin + d * shrink / l.std, l.low, l.high);
    x[at] = s.mask != nullptr && !s.mask[at] ? origin : next;
  }
}

Space space(
    const Tensor& x, const Optional& mean, const Optional& std, const Optional& mask, const Optional& active, double low,
    double high, int64_t channels, int64_t chunk) {
  const int64_t inner = x.numel() / x.size(0) / channels;
  return {data<float>(mean), data<float>(std), data<uint8_t>(mask), data<uint8_t>(active), float(low), float(high),
          channels, inner, ceil_div(inner, chunk)};
}

void linf_step_cuda(
    Tensor x, const Tensor& grad, const Tensor& x0, const Tensor& step, const Tensor& eps, const Optional& mean,
    const Optional& std, const Optional& mask, const Optional& active, double low, double high, int64_t channels,
    bool bytes) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Space s = space(x, mean, std, mask, active, low, high, channels, kChunk);
  const auto kernel = bytes ? linf_step<true> : linf_step<false>;
  kernel<<<x.size(0) * channels * s.chunks, kThreads, 0, stream_of(x)>>>(
      writable<float>(x), data<float>(grad), x0.const_data_ptr(), data<float>(step), data<float>(eps), s);
  check_launch();
}

void ball_step_cuda(
    Tensor x, const Tensor& grad, const Tensor& x0, const Tensor& step, const Tensor& eps, const Optional& mean,
    const Optional& std, const Optional& mask, const Optional& active, Tensor sums, double low, double high,
    int64_t channels, bool bytes, bool sign) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Space s = space(x, mean, std, mask, active, low, high, channels, kChunk);
  const int64_t blocks = x.size(0) * channels * s.chunks;
  STD_TORCH_CHECK(sums.numel() == blocks * 3, "sums has ", sums.numel(), " numbers, and ", blocks * 3, " are needed");
  const auto first = bytes ? (sign ? ball_sums<true, true> : ball_sums<true, false>)
                           : (sign ? ball_sums<false, true> : ball_sums<false, false>);
  const auto second = bytes ? (sign ? ball_step<true, true> : ball_step<true, false>)
                            : (sign ? ball_step<false, true> : ball_step<false, false>);
  first<<<blocks, kThreads, 0, stream_of(x)>>>(
      data<float>(x), data<float>(grad), x0.const_data_ptr(), writable<double>(sums), s);
  second<<<blocks, kThreads, 0, stream_of(x)>>>(
      writable<float>(x), data<float>(grad), x0.const_data_ptr(), data<float>(step), data<float>(eps), data<double>(sums), s);
  check_launch();
}

void linf_start_cuda(
    Tensor x, const Tensor& x0, const Tensor& eps, const Tensor& seed, const Tensor& offset, const Tensor& ids,
    const Tensor& stream, const Optional& mean, const Optional& std, const Optional& mask, double low, double high,
    int64_t channels, bool bytes) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Space s = space(x, mean, std, mask, std::nullopt, low, high, channels, kChunk);
  s.chunks = ceil_div(s.inner * channels, kChunk);
  const auto kernel = bytes ? linf_start<true> : linf_start<false>;
  kernel<<<x.size(0) * s.chunks, kThreads, 0, stream_of(x)>>>(
      writable<float>(x), x0.const_data_ptr(), data<float>(eps), data<int64_t>(seed), data<int64_t>(offset),
      data<int64_t>(ids), data<int64_t>(stream), s);
  check_launch();
}

}  // namespace
}  // namespace poisonshield

STABLE_TORCH_LIBRARY_IMPL(poisonshield_cuda, CUDA, m) {
  m.impl("linf_step_", TORCH_BOX(&poisonshield::linf_step_cuda));
  m.impl("ball_step_", TORCH_BOX(&poisonshield::ball_step_cuda));
  m.impl("linf_start_", TORCH_BOX(&poisonshield::linf_start_cuda));
}
