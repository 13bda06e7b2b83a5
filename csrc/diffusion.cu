// Noising, and the masked diffusion loss with its gradient in one pass; semantics: poisonshield/ops/diffusion/reference.py.
//
// noising reads x0 (and noise) and writes x_t: the two factors of a sample are read from alphas_cumprod in the kernel, and a
// seed draws the noise there. The loss reads pred, target and mask once and writes the gradient and a partial sum per block;
// a second kernel adds the partial sums of a row in a fixed order. No atomics.
// Tensors are float32, half or bfloat16, each load 16 bytes wide where all of them allow it; arithmetic is float32, sums are
// float64. All lie in one order of memory (Order).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#include <type_traits>

#include "launch.cuh"
#include "philox.cuh"

namespace poisonshield {
namespace {

constexpr int kBytes = 16;  // of a load

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ __forceinline__ T rounded(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// What a thread does: N numbers of a sample of `count`. Wide: side by side, and 16 bytes of them are a load. Else a step
// of kThreads apart, and some may lie beyond the end.
template <int N, bool kWide>
struct Share {
  uint32_t start, count;

  __device__ uint32_t at(int k) const { return kWide ? start + k : start + k * kThreads; }
  __device__ bool inside(int k) const { return (kWide ? start : at(k)) < count; }

  template <class T>
  __device__ __forceinline__ void load(float (&out)[N], const T* row) const {
    if constexpr (kWide) {
      constexpr int each = kBytes / sizeof(T);
      static_assert(N % each == 0);
      if (start >= count) return;
#pragma unroll
      for (int p = 0; p < N / each; ++p) {
        const float4 bits = reinterpret_cast<const float4*>(row + start)[p];
        T part[each];
        memcpy(part, &bits, kBytes);
#pragma unroll
        for (int k = 0; k < each; ++k) out[p * each + k] = to_float(part[k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = inside(k) ? to_float(row[at(k)]) : 0.0f;
    }
  }

  template <class T>
  __device__ __forceinline__ void store(T* row, const float (&in)[N]) const {
    if constexpr (kWide) {
      constexpr int each = kBytes / sizeof(T);
      constexpr int width = each < N ? each : N;  // half as wide, where four floats become four halves
      if (start >= count) return;
#pragma unroll
      for (int p = 0; p < N / width; ++p) {
        T part[width];
#pragma unroll
        for (int k = 0; k < width; ++k) part[k] = rounded<T>(in[p * width + k]);
        if constexpr (width == each) {
          float4 bits;
          memcpy(&bits, part, kBytes);
          reinterpret_cast<float4*>(row + start)[p] = bits;
        } else {
          float2 bits;
          memcpy(&bits, part, kBytes / 2);
          reinterpret_cast<float2*>(row + start)[p] = bits;
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (inside(k)) row[at(k)] = rounded<T>(in[k]);
      }
    }
  }
};

// The numbers that a thread has: 16 bytes of the first tensor it reads.
template <class T>
constexpr int kShare = kBytes / sizeof(T);

template <class T, bool kWide>
__device__ __forceinline__ Share<kShare<T>, kWide> share_of(uint32_t count, uint32_t chunk) {
  return {chunk * kThreads * kShare<T> + threadIdx.x * (kWide ? kShare<T> : 1), count};
}

// How a sample lies in memory: by rows, or, with `sites`, the channels of a site side by side.
struct Order {
  uint32_t channels, inner;
  bool sites;

  __device__ uint32_t channel(uint32_t i) const { return sites ? i % channels : i / inner; }
  __device__ uint32_t site(uint32_t i) const { return sites ? i / channels : i % inner; }
  __device__ uint32_t logical(uint32_t i) const { return sites ? channel(i) * inner + site(i) : i; }
};

// What a target is formed from. S: of all that is read beside the prediction.
template <class S>
struct Source {
  const S *target, *x0, *noise;
  const int64_t* t;
  const float* alphas;
  const int64_t *seed, *offset, *stream;
};

// Box-Muller: the first half of a sample's numbers are cosines, the second half sines of the same pairs.
template <class S>
__device__ __forceinline__ float normal(const Source<S>& s, int64_t b, uint32_t i, uint32_t count) {
  const uint32_t pairs = (count + 1) / 2, pair = i < pairs ? i : i - pairs;
  const Stream stream{*s.seed, *s.offset, b, *s.stream};
  const float radius = sqrtf(-2.0f * log1pf(-uniform_at(stream, pair)));
  const float turns = 2.0f * uniform_at(stream, pairs + pair);
  return radius * (i < pairs ? cospif(turns) : sinpif(turns));
}

// The noise of a thread's numbers, given or drawn; drawn noise is rounded to T, as if it had been stored.
template <class T, bool kDraw, int N, bool kWide, class S>
__device__ __forceinline__ void noise_of(
    float (&out)[N], const Share<N, kWide>& share, const Source<S>& s, int64_t b, const Order& order) {
  if constexpr (!kDraw) {
    share.load(out, s.noise + b * share.count);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (share.inside(k)) out[k] = to_float(rounded<T>(normal(s, b, order.logical(share.at(k)), share.count)));
    }
  }
}

// A kernel has three forms: given noise in wide loads, given noise one by one, and drawn noise, whose arithmetic takes longer
// than loads do and needs twice the registers.
template <class Launch>
void by_form(bool draw, bool wide, const Launch& launch) {
  if (draw) {
    launch(std::false_type(), std::true_type());
  } else if (wide) {
    launch(std::true_type(), std::false_type());
  } else {
    launch(std::false_type(), std::false_type());
  }
}

template <class T, class R, bool kWide, bool kDraw>
__global__ void __launch_bounds__(kThreads) noising(
    R* __restrict__ out, T* __restrict__ kept, Source<T> s, uint32_t count, uint32_t chunks, Order order) {
  constexpr int N = kShare<T>;
  const int64_t b = blockIdx.x / chunks;
  const auto share = share_of<T, kWide>(count, blockIdx.x % chunks);
  const float a = s.alphas[s.t[b]], signal = sqrtf(a), sigma = sqrtf(1.0f - a);
  float x0[N] = {}, noise[N] = {};
  share.load(x0, s.x0 + b * count);
  noise_of<T, kDraw>(noise, share, s, b, order);
  if (kept != nullptr) share.store(kept + b * count, noise);
#pragma unroll
  for (int k = 0; k < N; ++k) x0[k] = signal * x0[k] + sigma * noise[k];
  share.store(out + b * count, x0);
}

enum Kind { kGiven, kEpsilon, kV, kSample };
enum Loss { kSquare, kHuber, kAbsolute };

template <class T, bool kDraw, int N, bool kWide, class S>
__device__ __forceinline__ void target_of(
    float (&out)[N], const Share<N, kWide>& share, const Source<S>& s, int kind, int64_t b, const Order& order) {
  if (kind == kGiven) return share.load(out, s.target + b * share.count);
  if (kind == kSample) return share.load(out, s.x0 + b * share.count);
  noise_of<T, kDraw>(out, share, s, b, order);
  if (kind == kEpsilon) return;
  const float a = s.alphas[s.t[b]], signal = sqrtf(a), sigma = sqrtf(1.0f - a);
  float x0[N] = {};
  share.load(x0, s.x0 + b * share.count);
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = signal * out[k] - sigma * x0[k];
}

// The weights of sites: steps of 0 where rows or channels share them.
struct Mask {
  const float* at;
  int64_t row, channel;
};

template <int N, bool kWide>
__device__ __forceinline__ void weights_of(
    float (&out)[N], const Share<N, kWide>& share, const Mask& mask, int64_t b, const Order& order) {
  const float* row = mask.at + b * mask.row;
  if constexpr (kWide) {
    if (!order.sites) {  // all of one channel, see `wide`
      const uint32_t channel = share.start / order.inner;
      return share.load(out, row + channel * mask.channel - int64_t(channel) * order.inner);
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const uint32_t i = share.at(k);
    if (share.inside(k)) out[k] = row[order.channel(i) * mask.channel + order.site(i)];
  }
}

template <class T, class S, bool kWide, bool kDraw>
__global__ void __launch_bounds__(kThreads) loss_and_gradient(
    T* __restrict__ grad, double* __restrict__ sums, const T* __restrict__ pred, Source<S> s, Mask mask,
    const float* __restrict__ scale, int kind, int loss, float delta, uint32_t count, uint32_t chunks, Order order) {
  constexpr int N = kShare<T>;
  const int64_t b = blockIdx.x / chunks;
  const auto share = share_of<T, kWide>(count, blockIdx.x % chunks);
  const float row = scale[b];
  float p[N] = {}, target[N] = {}, m[N] = {};
  share.load(p, pred + b * count);
  target_of<T, kDraw>(target, share, s, kind, b, order);
  if (mask.at == nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) m[k] = share.inside(k) ? 1.0f : 0.0f;
  } else {
    weights_of(m, share, mask, b, order);
  }
  double sum = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float r = p[k] - target[k], size = fabsf(r);
    float value, slope;
    if (loss == kSquare) {
      value = r * r, slope = 2.0f * r;
    } else if (loss == kAbsolute) {
      value = size, slope = r > 0.0f ? 1.0f : (r < 0.0f ? -1.0f : r);
    } else {
      value = size <= delta ? 0.5f * r * r : delta * (size - 0.5f * delta);
      slope = size <= delta || isnan(r) ? r : copysignf(delta, r);
    }
    // Selected, so that NaN under the mask stays there.
    sum += double(m[k] != 0.0f ? value * m[k] : 0.0f);
    p[k] = m[k] != 0.0f ? slope * m[k] * row : 0.0f;
  }
  if (grad != nullptr) share.store(grad + b * count, p);
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) add_rows(
    float* __restrict__ losses, const double* __restrict__ sums, const float* __restrict__ scale, int64_t chunks) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += sums[blockIdx.x * chunks + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = float(sum) * scale[blockIdx.x];
}

Order order_of(const Tensor& t, int64_t inner) {
  const bool sites = t.size(1) > 1 && inner > 1 && t.stride(1) == 1;
  return {uint32_t(t.size(1)), uint32_t(inner), sites};
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % kBytes != 0) return false;
  }
  return true;
}

using torch::headeronly::ScalarType;

template <class T>
constexpr ScalarType kType = ScalarType::Float;
template <>
constexpr ScalarType kType<__half> = ScalarType::Half;
template <>
constexpr ScalarType kType<__nv_bfloat16> = ScalarType::BFloat16;

// run(A(), B()) for the types of two tensors. Of one type, or the first is float.
template <class Run>
void by_types(ScalarType a, ScalarType b, const Run& run) {
  const auto try_types = [&](auto first, auto second) {
    const bool found = a == kType<decltype(first)> && b == kType<decltype(second)>;
    if (found) run(first, second);
    return found;
  };
  const bool found = try_types(float(), float()) || try_types(float(), __half()) || try_types(float(), __nv_bfloat16()) ||
                     try_types(__half(), __half()) || try_types(__nv_bfloat16(), __nv_bfloat16());
  STD_TORCH_CHECK(found, "poisonshield: no kernel for these dtypes");
}

template <class S>
Source<S> source_of(
    const Optional& target, const Optional& x0, const Optional& noise, const Optional& t, const Optional& alphas,
    const Tensor& seed, const Tensor& offset, const Tensor& stream) {
  return {data<S>(target), data<S>(x0), data<S>(noise), data<int64_t>(t), data<float>(alphas),
          data<int64_t>(seed), data<int64_t>(offset), data<int64_t>(stream)};
}

void noising_cuda(
    Tensor out, Tensor kept, const Tensor& x0, const Optional& noise, const Tensor& t, const Tensor& alphas,
    const Tensor& seed, const Tensor& offset, const Tensor& stream, bool keep) {
  torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  by_types(x0.scalar_type(), out.scalar_type(), [&](auto from, auto to) {
    using T = decltype(from);
    using R = decltype(to);
    const int64_t count = x0.numel() / x0.size(0), chunks = ceil_div(count, kThreads * kShare<T>);
    const auto s = source_of<T>(std::nullopt, x0, noise, t, alphas, seed, offset, stream);
    T* const stored = keep ? writable<T>(kept) : nullptr;
    const bool wide = count % kShare<T> == 0 && aligned({out.const_data_ptr(), stored, s.x0, s.noise});
    by_form(s.noise == nullptr, wide, [&](auto whole, auto draw) {
      const auto kernel = &noising<T, R, whole.value, draw.value>;
      kernel<<<x0.size(0) * chunks, kThreads, 0, stream_of(x0)>>>(
          writable<R>(out), stored, s, count, chunks, order_of(x0, count / x0.size(1)));
    });
  });
  check_launch();
}

void loss_cuda(
    Tensor losses, Tensor grad, Tensor sums, const Tensor& pred, const Optional& target, const Optional& x0,
    const Optional& noise, const Optional& t, const Optional& alphas, const Tensor& seed, const Tensor& offset,
    const Tensor& stream, const Optional& mask, const Tensor& scale, int64_t kind, int64_t loss, double delta, int64_t inner,
    int64_t mask_row, int64_t mask_channel, bool pred_grad) {
  torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  const auto& first = target.has_value() ? target : x0.has_value() ? x0 : noise;
  const int64_t rows = pred.size(0), count = pred.numel() / rows;
  by_types(first.has_value() ? first->scalar_type() : pred.scalar_type(), pred.scalar_type(), [&](auto from, auto to) {
    using S = decltype(from);
    using T = decltype(to);
    const int64_t chunks = ceil_div(count, kThreads * kShare<T>);
    STD_TORCH_CHECK(sums.numel() == rows * chunks, "sums has ", sums.numel(), " numbers, and ", rows * chunks, " are needed");
    const auto s = source_of<S>(target, x0, noise, t, alphas, seed, offset, stream);
    const Mask weights{data<float>(mask), mask_row, mask_channel};
    T* const written = pred_grad ? writable<T>(grad) : nullptr;
    const Order order = order_of(pred, inner);
    // A piece of a mask is one load where it lies within one channel.
    const bool pieces = weights.at == nullptr || order.sites || inner % kShare<T> == 0;
    const bool wide = count % kShare<T> == 0 && pieces &&
                      aligned({pred.const_data_ptr(), written, s.target, s.x0, s.noise, order.sites ? nullptr : weights.at});
    const bool drawn = s.noise == nullptr && (kind == kEpsilon || kind == kV);
    by_form(drawn, wide, [&](auto whole, auto draw) {
      const auto kernel = &loss_and_gradient<T, S, whole.value, draw.value>;
      kernel<<<rows * chunks, kThreads, 0, stream_of(pred)>>>(
          written, writable<double>(sums), data<T>(pred), s, weights, data<float>(scale), int(kind), int(loss), float(delta),
          count, chunks, order);
    });
    add_rows<<<rows, kThreads, 0, stream_of(pred)>>>(writable<float>(losses), data<double>(sums), data<float>(scale), chunks);
  });
  check_launch();
}

}  // namespace
}  // namespace poisonshield

STABLE_TORCH_LIBRARY_IMPL(poisonshield_cuda, CUDA, m) {
  m.impl("noising_", TORCH_BOX(&poisonshield::noising_cuda));
  m.impl("loss_", TORCH_BOX(&poisonshield::loss_cuda));
}
