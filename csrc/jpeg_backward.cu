// The gradient of JPEG. Semantics: Pipeline.gradient in poisonshield/ops/jpeg/reference.py.
//
// The transform is orthonormal, so that its adjoint is its inverse and the tables cancel:
// dx = A' D' (slope(u) * D (kept * C' (kept * g))): C makes colours of planes and A planes of colours, D is the
// transform, and u the coefficients in units of the table, which are computed again from x. 4:4:4 is one kernel. 4:2:0
// takes decoded planes from `decode_units` (jpeg_planes.cuh); then a warp makes d loss/d (Y, Cb, Cr) of its unit and of
// the pixels around it, which the adjoint of the triangle filter takes in, and all that follows. Padding was copied
// from the last row and column, to which its gradient is added. d loss/d tables is summed over a thread block in a
// fixed order; no atomics.
#include <cuda_runtime.h>

#include "jpeg_colours.cuh"
#include "jpeg_half.cuh"
#include "jpeg_launch.cuh"
#include "jpeg_pixels.cuh"
#include "jpeg_planes.cuh"

namespace poisonshield {
namespace {

// The slope of a clamp at v; a NaN is outside.
__device__ __forceinline__ float kept(float v, float low, float high, float clamp_grad) {
  return v >= low && v <= high ? 1.0f : clamp_grad;
}

// d loss/d (Y, Cb, Cr) of a pixel in place of d loss/d (R, G, B), both as the planes and the tensor have them.
__device__ __forceinline__ void through_colours(
    float y, float cb, float cr, const Space& space, float clamp_grad, float& g0, float& g1, float& g2) {
  float rgb[3];
  to_colours(y, cb, cr, rgb);
  const float r = g0 * space.inverse[0] * kept(rgb[0], 0.0f, 255.0f, clamp_grad);
  const float g = g1 * space.inverse[1] * kept(rgb[1], 0.0f, 255.0f, clamp_grad);
  const float b = g2 * space.inverse[2] * kept(rgb[2], 0.0f, 255.0f, clamp_grad);
  g0 = r + g + b;
  g1 = kBlueCb * b + kGreenCb * g;
  g2 = kRedCr * r + kGreenCr * g;
}

// d loss/d (R, G, B) of eight pixels in place of d loss/d (Y, Cb, Cr).
__device__ __forceinline__ void from_planes(const Space& space, float (&g)[3][8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float y = g[0][i], cb = g[1][i], cr = g[2][i];
    g[0][i] = (0.299f * y + kCbRed * cb + 0.5f * cr) * space.scale[0];
    g[1][i] = (0.587f * y + kCbGreen * cb + kCrGreen * cr) * space.scale[1];
    g[2][i] = (0.114f * y + 0.5f * cb + kCrBlue * cr) * space.scale[2];
  }
}

// d loss/d tables of a thread block, a part from each warp.
struct TableSums {
  float parts[kJpegWarps][2][64];

  // A warp adds up its blocks; t is a column of one.
  __device__ __forceinline__ void take(float (&t)[8], int table, const Place& at) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      t[k] += __shfl_xor_sync(kAllLanes, t[k], 8);
      t[k] += __shfl_xor_sync(kAllLanes, t[k], 16);
      if (at.lane < 8) parts[at.warp][table][k * 8 + at.lane] = t[k];
    }
  }

  __device__ __forceinline__ void write(const JpegCall& call) const {
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < kJpegWarps; ++warp) sum += parts[warp][threadIdx.x / 64][threadIdx.x % 64];
    call.sums[int64_t(blockIdx.x) * 128 + threadIdx.x] = sum;
  }
};

// d loss/d samples in place of d loss/d decoded samples, a row of a block; u: a column of its coefficients in units of
// the table. To t it adds d loss/d table where `counts`.
__device__ __forceinline__ void through_block(
    float (&g)[8], const float (&u)[8], float (&t)[8], bool counts, Scratch& scratch, const Place& at,
    const JpegCall& call) {
  transforms::forward_pass<transforms::FloatRules>(g);
  transpose(g, scratch, at);
  transforms::forward_pass<transforms::FloatRules>(g);
  float slopes[8];
  slopes_of(u, call, slopes);
  if (call.sums != nullptr && counts) {
    float whole[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) whole[k] = u[k];
    round_all(whole, call);
#pragma unroll
    for (int k = 0; k < 8; ++k) t[k] += g[k] * 0.125f * (whole[k] - u[k] * slopes[k]);
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) g[k] *= slopes[k] * 0.015625f;  // 1 / 64: both transforms are 8 times the orthonormal
  Smooth::inverse(g, scratch, at);
}

// The sum of columns from `inside` on, which were copies of the one before.
__device__ __forceinline__ float beyond(const float (&g)[8], int inside) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += i >= inside ? g[i] : 0.0f;
  return sum;
}

__device__ __forceinline__ void add_at(float (&g)[8], int column, float value) {
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] += i == column ? value : 0.0f;
}

// Rows below the picture were copies of its last one, whose lane gets the sum. kLanes: the bits of a lane's number that
// tell the rows of one column of blocks apart.
template <int kLanes>
__device__ __forceinline__ void fold_rows(float (&g)[8], int y, int h) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float sum = y >= h - 1 ? g[i] : 0.0f;
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
      if (kLanes & bit) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    }
    if (y == h - 1) g[i] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kJpegThreads) return_whole(JpegCall call) {
  __shared__ Shared<Smooth> shared;
  __shared__ TableSums sums;
  const Place at(call);
  const Block block(call, at);
  shared.fill(call, at);
  const int y = min(block.y, call.h - 1);
  Scratch& scratch = shared.scratch[at.warp];
  float units[3][8], g[3][8];
  unsigned int outside = 0;  // a bit for each decoded sample that its plane's clamp cuts
  load_pixels<T>(call.x, at.sample, y, block.x, call.w, g);
  to_range(shared.space, g);
  float planes[3][8];
  to_planes(g, call.integer, planes);
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    Smooth::encode(planes[p], shared.tables[p > 0], scratch, at);
#pragma unroll
    for (int k = 0; k < 8; ++k) units[p][k] = planes[p][k];
    Smooth::decode(planes[p], shared.tables[p > 0], scratch, at, call);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float v = planes[p][i];
      outside |= v >= -128.0f && v <= 127.0f ? 0u : 1u << (8 * p + i);
    }
    to_plane(planes[p], call.integer);
  }
  load_pixels<T>(call.grad, at.sample, y, block.x, call.w, g);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    through_colours(planes[0][i], planes[1][i], planes[2][i], shared.space, call.clamp_grad, g[0][i], g[1][i], g[2][i]);
    const bool inside = block.y < call.h && block.x + i < call.w;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      const float by_clamp = outside >> (8 * p + i) & 1 ? call.clamp_grad : 1.0f;
      g[p][i] = inside ? g[p][i] * by_clamp : 0.0f;
    }
  }
  float by_table[2][8] = {};
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    through_block(g[p], units[p], by_table[p > 0], block.valid, scratch, at, call);
    add_at(g[p], call.w - 1 - block.x, beyond(g[p], call.w - block.x));
    if (call.h % 8 != 0) fold_rows<7>(g[p], block.y, call.h);
  }
  from_planes(shared.space, g);
  if (block.valid && block.y < call.h) store_pixels<T>(call.out, at.sample, block.y, block.x, call.w, g);
  if (call.sums == nullptr) return;
  sums.take(by_table[0], 0, at);
  sums.take(by_table[1], 1, at);
  sums.write(call);
}

// d loss/d (Cb, Cr) at full size, of a unit and the pixels around it.
struct Halo {
  float at[2][18][19];
};

// d loss/d (Y, Cb, Cr) of one pixel; 0 outside of the picture.
template <class T>
__device__ __forceinline__ void pixel_gradient(
    const JpegCall& call, const Space& space, const Planes<float>& planes, int64_t sample, int y, int x,
    float (&g)[3]) {
  g[0] = g[1] = g[2] = 0.0f;
  if (y < 0 || x < 0 || y >= call.h || x >= call.w) return;
  // Eight samples at once, as elsewhere: of Cb and Cr the four that the triangle filter mixes; and of luminance one.
  const int rows[2] = {y / 2, far_of(y, call.ch)}, columns[2] = {x / 2, far_of(x, call.cw)};
  float v[8], luma[8] = {planes.luma_row(y)[x]};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = planes.chroma_row(i / 4, rows[i % 2])[columns[i / 2 % 2]];
  to_plane(v, call.integer);
  to_plane(luma, call.integer);
  float chroma[8] = {};
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    chroma[p] = mixed_columns(mixed_rows(v[4 * p], v[4 * p + 1]), mixed_rows(v[4 * p + 2], v[4 * p + 3]), 0);
  }
  store_all(chroma, call.integer);
  const int64_t* s = call.grad.strides;
  const T* from = static_cast<const T*>(call.grad.data) + sample * s[0] + y * s[2] + x * s[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) g[c] = widened(from[c * s[1]]);
  through_colours(luma[0], chroma[0], chroma[1], space, call.clamp_grad, g[0], g[1], g[2]);
}

// The lane's eight pixels: d loss/d Y, times the slope of the plane's clamp; d loss/d (Cb, Cr) goes to the halo.
template <class T>
__device__ __forceinline__ void own_gradient(
    const JpegCall& call, const Space& space, const Planes<float>& planes, const Place& at, const Unit& unit,
    Halo& halo, float (&luma)[8]) {
  const int y = min(unit.y, call.h - 1);
  float v[3][8], g[3][8];
  load_words(planes.luma_row(unit.y) + unit.x, luma);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[0][i] = luma[i];
  to_plane(v[0], call.integer);
  enlarged<Smooth>(call, planes, 0, y, unit.x, v[1]);
  enlarged<Smooth>(call, planes, 1, y, unit.x, v[2]);
  load_pixels<T>(call.grad, at.sample, y, unit.x, call.w, g);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    through_colours(v[0][i], v[1][i], v[2][i], space, call.clamp_grad, g[0][i], g[1][i], g[2][i]);
    const bool inside = unit.y < call.h && unit.x + i < call.w;
    luma[i] = inside ? g[0][i] * kept(luma[i], -128.0f, 127.0f, call.clamp_grad) : 0.0f;
    const int row = unit.y - unit.top + 1, column = unit.x - unit.left + 1 + i;
    halo.at[0][row][column] = inside ? g[1][i] : 0.0f;
    halo.at[1][row][column] = inside ? g[2][i] : 0.0f;
  }
}

// The 68 pixels around a unit.
template <class T>
__device__ __forceinline__ void gradient_around(
    const JpegCall& call, const Space& space, const Planes<float>& planes, const Place& at, const Unit& unit,
    Halo& halo) {
  for (int n = at.lane; n < 68; n += 32) {
    const int row = n < 36 ? n / 18 * 17 : (n - 36) / 2 + 1, column = n < 36 ? n % 18 : (n - 36) % 2 * 17;
    float g[3];
    pixel_gradient<T>(call, space, planes, at.sample, unit.top + row - 1, unit.left + column - 1, g);
    halo.at[0][row][column] = g[1];
    halo.at[1][row][column] = g[2];
  }
}

// The adjoint of `enlarged`: d loss/d a row of decoded Cb (group 0) or Cr (1).
__device__ __forceinline__ void reduced(
    const JpegCall& call, const Place& at, const Unit& unit, const Halo& halo, float (&g)[8]) {
  const int plane = at.group % 2, r = unit.top / 2 + at.row;
  const float(*rows)[19] = halo.at[plane] + 2 * at.row;  // from the pixel row above the two that lie under this row
  if (!call.smooth) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      g[i] = rows[1][2 * i + 1] + rows[1][2 * i + 2] + rows[2][2 * i + 1] + rows[2][2 * i + 2];
    }
  } else {
    // A pixel beside the edge has nothing beyond it, and takes all of the last sample. Outside of the picture is 0.
    const float upper = r == 0 ? 1.0f : 0.75f, lower = r == call.ch - 1 ? 1.0f : 0.75f;
    float mixed[18];
#pragma unroll
    for (int j = 0; j < 18; ++j) {
      mixed[j] = 0.25f * (rows[0][j] + rows[3][j]) + upper * rows[1][j] + lower * rows[2][j];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int c = unit.left / 2 + i;
      const float left = c == 0 ? 1.0f : 0.75f, right = c == call.cw - 1 ? 1.0f : 0.75f;
      g[i] = 0.25f * (mixed[2 * i] + mixed[2 * i + 3]) + left * mixed[2 * i + 1] + right * mixed[2 * i + 2];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (r >= call.ch || unit.left / 2 + i >= call.cw) g[i] = 0.0f;
  }
}

// The adjoint of `split_unit`'s averages: d loss/d (Cb, Cr) of the lane's pixels.
__device__ __forceinline__ void spread(
    const JpegCall& call, const Place& at, const Unit& unit, ChromaTile<float>& tile, const float (&chroma)[8],
    float (&cb)[8], float (&cr)[8]) {
  __syncwarp();
  if (at.group < 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) tile.at[at.group][at.row][i] = chroma[i];
  }
  __syncwarp();
  const int row = (unit.y - unit.top) / 2, last = row == unit.inside - 1 ? 7 : row;  // padding was the last row's copy
  const float share = unit.y == call.h - 1 && call.h % 2 ? 0.5f : 0.25f;           // a lone last row counts twice
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum[2] = {};
    for (int r = row; r <= last; ++r) {
      sum[0] += tile.at[0][r][at.group % 2 * 4 + i];
      sum[1] += tile.at[1][r][at.group % 2 * 4 + i];
    }
    cb[2 * i] = cb[2 * i + 1] = sum[0] * share;
    cr[2 * i] = cr[2 * i + 1] = sum[1] * share;
  }
}

template <class T>
__global__ void __launch_bounds__(kJpegThreads) return_units(JpegCall call) {
  __shared__ Shared<Smooth> shared;
  __shared__ ChromaTile<float> tiles[kJpegWarps];
  __shared__ Halo halos[kJpegWarps];
  __shared__ TableSums sums;
  const Place at(call);
  const Unit unit(call, at);
  shared.fill(call, at);
  const Planes<float> planes(call, at.sample);
  Scratch& scratch = shared.scratch[at.warp];
  float luma_units[8], chroma_units[8], g[3][8], chroma[8], by_table[2][8] = {};
  split_unit<Smooth, T>(call, shared, tiles[at.warp], at, unit, luma_units, chroma_units);
  Smooth::encode(luma_units, shared.tables[0], scratch, at);
  Smooth::encode(chroma_units, shared.tables[1], scratch, at);
  own_gradient<T>(call, shared.space, planes, at, unit, halos[at.warp], g[0]);
  if (call.smooth) gradient_around<T>(call, shared.space, planes, at, unit, halos[at.warp]);
  __syncwarp();
  reduced(call, at, unit, halos[at.warp], chroma);
  const float* decoded = planes.chroma_row(at.group % 2, unit.top / 2 + at.row) + unit.left / 2;
  float samples[8];
  load_words(decoded, samples);
#pragma unroll
  for (int i = 0; i < 8; ++i) chroma[i] *= kept(samples[i], -128.0f, 127.0f, call.clamp_grad);
  through_block(chroma, chroma_units, by_table[1], unit.valid && at.group < 2, scratch, at, call);
  through_block(g[0], luma_units, by_table[0], unit.valid, scratch, at, call);
  if (call.h % 16 != 0) fold_rows<1 | 2 | 4 | 16>(g[0], unit.y, call.h);
  spread(call, at, unit, tiles[at.warp], chroma, g[1], g[2]);
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    float sum = beyond(g[p], call.w - unit.x);
    sum += __shfl_xor_sync(kAllLanes, sum, 8);  // from the unit's other half; where this is the right one it gives 0
    add_at(g[p], call.w - 1 - unit.x, sum);
  }
  from_planes(shared.space, g);
  if (unit.valid && unit.y < call.h) store_pixels<T>(call.out, at.sample, unit.y, unit.x, call.w, g);
  if (call.sums == nullptr) return;
  sums.take(by_table[0], 0, at);
  sums.take(by_table[1], 1, at);
  sums.write(call);
}

template <class T>
void run_backward(const JpegCall& call, bool half, cudaStream_t stream) {
  const int64_t blocks = call.batch * call.chunks;
  if (half) {
    const auto first = decode_units<Smooth, T>;
    first<<<blocks, kJpegThreads, 0, stream>>>(call);
  }
  const auto kernel = half ? return_units<T> : return_whole<T>;
  kernel<<<blocks, kJpegThreads, 0, stream>>>(call);
}

void jpeg_backward_cuda(
    Tensor dx, Tensor sums, Tensor planes, const Tensor& grad, const Tensor& x, const Tensor& tables,
    const Tensor& affine, bool half, bool smooth, bool integer, int64_t rounding, int64_t terms, double clamp_grad) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  JpegCall call = jpeg_call(x, tables, affine, half);
  call.out = image(dx, x);
  call.grad = image(grad, x);
  call.planes = planes_of(planes, x, call, half, sizeof(float));
  if (sums.numel() > 0) {
    const int64_t needed = call.batch * call.chunks * 128;
    STD_TORCH_CHECK(sums.numel() == needed, "sums has ", sums.numel(), " numbers, and ", needed, " are needed");
    check_device(sums, x);
    call.sums = writable<float>(sums);
  }
  call.smooth = smooth;
  call.integer = integer;
  call.rounding = int32_t(rounding);
  call.terms = int32_t(terms);
  call.clamp_grad = float(clamp_grad);
  const cudaStream_t stream = stream_of(x);
  with_floats(x.scalar_type(), [&](auto kind) { run_backward<decltype(kind)>(call, half, stream); });
  check_launch();
}

}  // namespace
}  // namespace poisonshield

STABLE_TORCH_LIBRARY_IMPL(poisonshield_cuda, CUDA, m) {
  m.impl("jpeg_backward_", TORCH_BOX(&poisonshield::jpeg_backward_cuda));
}
