// JPEG, compressed and decompressed in one go: smooth and exact. Semantics: reference.py and exact.py in
// poisonshield/ops/jpeg.
//
// 4:4:4 is one kernel, which reads and writes each pixel once. 4:2:0 is two: `decode_units` (jpeg_planes.cuh) leaves
// decoded planes, 1.5 images of one channel, in float32 or, in exact mode, bytes; `join_planes` enlarges chrominance
// and converts, and neighbours share what the triangle filter reads, in the cache. A NaN stays within 16x16 pixels and
// one around them.
#include <cuda_runtime.h>

#include "jpeg_colours.cuh"
#include "jpeg_half.cuh"
#include "jpeg_launch.cuh"
#include "jpeg_pixels.cuh"
#include "jpeg_planes.cuh"

namespace poisonshield {
namespace {

template <class R, class T>
__global__ void __launch_bounds__(kJpegThreads) code_whole(JpegCall call) {
  __shared__ Shared<R> shared;
  const Place at(call);
  const Block block(call, at);
  shared.fill(call, at);
  float pixels[3][8];
  load_pixels<T>(call.x, at.sample, min(block.y, call.h - 1), block.x, call.w, pixels);
  to_range(shared.space, pixels);
  typename R::V planes[3][8];
  to_planes(pixels, call.integer, planes);
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    if (p > 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) planes[p][i] = centred(planes[p][i]);
    }
    const auto* table = shared.tables[p > 0];
    R::encode(planes[p], table, shared.scratch[at.warp], at);
    R::decode(planes[p], table, shared.scratch[at.warp], at, call);
    to_plane(planes[p], call.integer);
  }
  to_result(planes, shared.space, call.integer, pixels);
  if (block.valid && block.y < call.h) store_pixels<T>(call.out, at.sample, block.y, block.x, call.w, pixels);
}

// A thread takes eight pixels of a row. Here a chunk is kJpegThreads of these.
template <class R, class T>
__global__ void __launch_bounds__(kJpegThreads) join_planes(JpegCall call, int eights, int chunks) {
  __shared__ Space space;
  const int64_t sample = blockIdx.x / unsigned(chunks);
  space.fill(call.affine);
  __syncthreads();
  const unsigned int n = blockIdx.x % unsigned(chunks) * kJpegThreads + threadIdx.x;  // 64-bit division is slow
  const int y = n / unsigned(eights), x = n % unsigned(eights) * 8;
  if (y >= call.h) return;
  const Planes<typename R::Stored> planes(call, sample);
  typename R::V v[3][8];
  typename R::Stored luma[8];
  load_words(planes.luma_row(y) + x, luma);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[0][i] = typename R::V(luma[i]);
  to_plane(v[0], call.integer);
  enlarged<R>(call, planes, 0, y, x, v[1]);
  enlarged<R>(call, planes, 1, y, x, v[2]);
  float pixels[3][8];
  to_result(v, space, call.integer, pixels);
  store_pixels<T>(call.out, sample, y, x, call.w, pixels);
}

template <class R, class T>
void run(const JpegCall& call, bool half, cudaStream_t stream) {
  if (!half) {
    const auto kernel = code_whole<R, T>;
    kernel<<<call.batch * call.chunks, kJpegThreads, 0, stream>>>(call);
    return;
  }
  const auto first = decode_units<R, T>;
  first<<<call.batch * call.chunks, kJpegThreads, 0, stream>>>(call);
  const int eights = (call.w + 7) / 8, chunks = ceil_div(int64_t(eights) * call.h, kJpegThreads);
  const auto second = join_planes<R, T>;
  second<<<call.batch * chunks, kJpegThreads, 0, stream>>>(call, eights, chunks);
}

void jpeg_cuda(
    Tensor out, Tensor planes, const Tensor& x, const Tensor& tables, const Tensor& affine, bool half, bool smooth,
    bool exact, bool integer, int64_t rounding, int64_t terms) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  JpegCall call = jpeg_call(x, tables, affine, half);
  call.out = image(out, x);
  call.planes = planes_of(planes, x, call, half, exact ? sizeof(Exact::Stored) : sizeof(Smooth::Stored));
  call.smooth = smooth;
  call.integer = integer;
  call.rounding = int32_t(rounding);
  call.terms = int32_t(terms);
  const cudaStream_t stream = stream_of(x);
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Byte) {
    STD_TORCH_CHECK(exact, "8-bit pixels are for exact mode");
    run<Exact, uint8_t>(call, half, stream);
  } else {
    with_floats(type, [&](auto kind) {
      typedef decltype(kind) T;
      exact ? run<Exact, T>(call, half, stream) : run<Smooth, T>(call, half, stream);
    });
  }
  check_launch();
}

}  // namespace
}  // namespace poisonshield

STABLE_TORCH_LIBRARY_IMPL(poisonshield_cuda, CUDA, m) { m.impl("jpeg_", TORCH_BOX(&poisonshield::jpeg_cuda)); }
