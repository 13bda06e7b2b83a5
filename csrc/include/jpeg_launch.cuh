// From tensors to what the kernels of JPEG are told.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "jpeg_call.cuh"
#include "launch.cuh"

namespace poisonshield {

using torch::headeronly::ScalarType;

// A kernel would read a pointer of another device, or of the host, as one of its own.
inline void check_device(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(),
                  "a tensor is on another device than x");
}

inline Image image(const Tensor& t, const Tensor& x) {
  check_device(t, x);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.numel() == x.numel() && t.size(3) == x.size(3),
                  "a tensor of pixels differs from x in dtype or shape");
  return {const_cast<void*>(t.const_data_ptr()), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

inline JpegCall jpeg_call(const Tensor& x, const Tensor& tables, const Tensor& affine, bool half) {
  STD_TORCH_CHECK(tables.scalar_type() == ScalarType::Float && affine.scalar_type() == ScalarType::Float,
                  "tables and affine must be float32");
  STD_TORCH_CHECK(tables.size(0) == x.size(0) && tables.numel() == x.size(0) * 128 && affine.numel() == 6,
                  "tables must be [B, 2, 8, 8] and affine [2, 3]");
  check_device(tables, x);
  check_device(affine, x);
  STD_TORCH_CHECK(x.numel() / x.size(0) < int64_t(1) << 31, "a picture of 2^31 numbers or more");
  JpegCall call = {};
  call.x = image(x, x);
  call.tables = data<float>(tables);
  call.table_stride = tables.stride(0);
  call.affine = data<float>(affine);
  call.batch = x.size(0);
  call.h = int32_t(x.size(2));
  call.w = int32_t(x.size(3));
  call.ch = (call.h + 1) / 2;
  call.cw = (call.w + 1) / 2;
  const int side = half ? 16 : 8, each = half ? kJpegWarps : kJpegThreads / 8;
  call.across = int32_t(ceil_div(call.w, side));
  call.cells = int32_t(ceil_div(call.h, side)) * call.across;
  call.chunks = int32_t(ceil_div(call.cells, each));
  return call;
}

inline void* planes_of(Tensor& planes, const Tensor& x, const JpegCall& call, bool half, int64_t element_size) {
  check_device(planes, x);
  if (!half) return nullptr;
  const int64_t needed = call.batch * call.cells * (256 + 2 * 64) * element_size;
  const int64_t given = planes.numel() * (planes.scalar_type() == ScalarType::Float ? 4 : 1);
  STD_TORCH_CHECK(given == needed, "planes has ", given, " bytes, and ", needed, " are needed");
  return planes.mutable_data_ptr();
}

// work(T()) for the type of numbers that a tensor has.
template <class Work>
void with_floats(ScalarType type, const Work& work) {
  if (type == ScalarType::Float) {
    work(float());
  } else if (type == ScalarType::Half) {
    work(__half());
  } else {
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "pixels are neither float32, bfloat16, half nor 8 bits");
    work(__nv_bfloat16());
  }
}

}  // namespace poisonshield
