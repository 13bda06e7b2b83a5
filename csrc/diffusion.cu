// Noising, and the masked diffusion loss with its gradient in one pass; semantics: poisonshield/ops/diffusion/reference.py.
//
// noising reads x0 (and noise) and writes x_t: the two factors of a sample are read from alphas_cumprod in the kernel, and a
// seed draws the noise there. The loss reads pred, target and mask once and writes the gradient and a partial sum per block;
// a second kernel adds the partial sums of a row in a fixed order. No atomics.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "philox.cuh"

namespace poisonshield {
namespace {

constexpr int kEach = 4;
constexpr int kChunk = kThreads * kEach;

struct Source {
  const float *target, *x0, *noise;
  const int64_t* t;
  const float* alphas;
  const int64_t *seed, *offset, *stream;
};

// Box-Muller: the first half of a sample's numbers are cosines, the second half sines of the same pairs.
__device__ __forceinline__ float normal(const Source& s, int64_t b, int64_t i, int64_t count) {
  const int64_t pairs = (count + 1) / 2, pair = i < pairs ? i : i - pairs;
  const Stream stream{*s.seed, *s.offset, b, *s.stream};
  const float radius = sqrtf(-2.0f * log1pf(-uniform_at(stream, uint32_t(pair))));
  const float turns = 2.0f * uniform_at(stream, uint32_t(pairs + pair));
  return radius * (i < pairs ? cospif(turns) : sinpif(turns));
}

__global__ void __launch_bounds__(kThreads) noising(
    float* __restrict__ out, float* __restrict__ kept, Source s, int64_t count, int64_t chunks) {
  const int64_t b = blockIdx.x / chunks, start = (blockIdx.x % chunks) * kChunk + threadIdx.x;
  const float a = s.alphas[s.t[b]], signal = sqrtf(a), sigma = sqrtf(1.0f - a);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = start + k * kThreads, at = b * count + i;
    if (i >= count) break;
    const float noise = s.noise != nullptr ? s.noise[at] : normal(s, b, i, count);
    if (kept != nullptr) kept[at] = noise;
    out[at] = signal * s.x0[at] + sigma * noise;
  }
}

enum Kind { kGiven, kEpsilon, kV, kSample };
enum Loss { kSquare, kHuber, kAbsolute };

__device__ __forceinline__ float target_of(const Source& s, int kind, int64_t b, int64_t i, int64_t count, float signal,
                                           float sigma) {
  const int64_t at = b * count + i;
  if (kind == kGiven) return s.target[at];
  if (kind == kSample) return s.x0[at];
  const float noise = s.noise != nullptr ? s.noise[at] : normal(s, b, i, count);
  return kind == kEpsilon ? noise : signal * noise - sigma * s.x0[at];
}

__global__ void __launch_bounds__(kThreads) loss_and_gradient(
    float* __restrict__ grad, double* __restrict__ sums, const float* __restrict__ pred, Source s,
    const float* __restrict__ mask, const float* __restrict__ scale, int kind, int loss, float delta, int64_t count,
    int64_t chunks, int64_t inner, int64_t mask_row, int64_t mask_channel) {
  const int64_t b = blockIdx.x / chunks, start = (blockIdx.x % chunks) * kChunk + threadIdx.x;
  const float a = kind == kV ? s.alphas[s.t[b]] : 0.0f, signal = sqrtf(a), sigma = sqrtf(1.0f - a), row = scale[b];
  double sum = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = start + k * kThreads, at = b * count + i;
    if (i >= count) break;
    const float m = mask == nullptr ? 1.0f : mask[b * mask_row + i / inner * mask_channel + i % inner];
    float slope = 0.0f;
    if (m != 0.0f) {  // selected, so that NaN under the mask stays there
      const float r = pred[at] - target_of(s, kind, b, i, count, signal, sigma), size = fabsf(r);
      float value;
      if (loss == kSquare) {
        value = r * r, slope = 2.0f * r;
      } else if (loss == kAbsolute) {
        value = size, slope = r > 0.0f ? 1.0f : (r < 0.0f ? -1.0f : r);
      } else {
        value = size <= delta ? 0.5f * r * r : delta * (size - 0.5f * delta);
        slope = size <= delta || isnan(r) ? r : copysignf(delta, r);
      }
      sum += double(value * m);
      slope *= m;
    }
    if (grad != nullptr) grad[at] = slope * row;
  }
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

void noising_cuda(
    Tensor out, Tensor kept, const Tensor& x0, const Optional& noise, const Tensor& t, const Tensor& alphas,
    const Tensor& seed, const Tensor& offset, const Tensor& stream, bool keep) {
  torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  const Source s{nullptr, data<float>(x0), data<float>(noise), data<int64_t>(t), data<float>(alphas),
                 data<int64_t>(seed), data<int64_t>(offset), data<int64_t>(stream)};
  const int64_t count = x0.numel() / x0.size(0), chunks = ceil_div(count, kChunk);
  noising<<<x0.size(0) * chunks, kThreads, 0, stream_of(x0)>>>(
      writable<float>(out), keep ? writable<float>(kept) : nullptr, s, count, chunks);
  check_launch();
}

void loss_cuda(
    Tensor losses, Tensor grad, Tensor sums, const Tensor& pred, const Optional& target, const Optional& x0,
    const Optional& noise, const Optional& t, const Optional& alphas, const Tensor& seed, const Tensor& offset,
    const Tensor& stream, const Optional& mask, const Tensor& scale, int64_t kind, int64_t loss, double delta, int64_t inner,
    int64_t mask_row, int64_t mask_channel, bool pred_grad) {
  torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  const Source s{data<float>(target), data<float>(x0), data<float>(noise), data<int64_t>(t), data<float>(alphas),
                 data<int64_t>(seed), data<int64_t>(offset), data<int64_t>(stream)};
  const int64_t rows = pred.size(0), count = pred.numel() / rows, chunks = ceil_div(count, kChunk);
  STD_TORCH_CHECK(sums.numel() == rows * chunks, "sums has ", sums.numel(), " numbers, and ", rows * chunks, " are needed");
  loss_and_gradient<<<rows * chunks, kThreads, 0, stream_of(pred)>>>(
      pred_grad ? writable<float>(grad) : nullptr, writable<double>(sums), data<float>(pred), s, data<float>(mask),
      data<float>(scale), int(kind), int(loss), float(delta), count, chunks, inner, mask_row, mask_channel);
  add_rows<<<rows, kThreads, 0, stream_of(pred)>>>(writable<float>(losses), data<double>(sums), data<float>(scale), chunks);
  check_launch();
}

}  // namespace
}  // namespace poisonshield

STABLE_TORCH_LIBRARY_IMPL(poisonshield_cuda, CUDA, m) {
  m.impl("noising_", TORCH_BOX(&poisonshield::noising_cuda));
  m.impl("loss_", TORCH_BOX(&poisonshield::loss_cuda));
}
