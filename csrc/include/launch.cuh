// What every file of kernels needs: tensors to pointers, the current stream, and sums in a fixed order.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace poisonshield {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int kThreads = 256;

template <typename T>
const T* data(const Tensor& t) {
  return reinterpret_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* data(const Optional& t) {
  return t.has_value() ? reinterpret_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T>
T* writable(Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr());
}

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline bool beside(const Tensor& x, const Tensor& other) {
  return other.get_device_index() == x.get_device_index() && other.is_cpu() == x.is_cpu();
}
inline bool beside(const Tensor& x, const Optional& other) { return !other.has_value() || beside(x, *other); }

// A kernel would read a pointer of another device, or of the host, as one of its own.
template <class... Others>
void check_devices(const Tensor& x, const Others&... others) {
  STD_TORCH_CHECK((beside(x, others) && ...), "poisonshield: a tensor is on another device than the first one");
}

inline void check_launch() {
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, "poisonshield: a kernel did not start: ", cudaGetErrorString(status));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum of v over the threads of a block, in the same order every time. Every thread gets it.
__device__ __forceinline__ double block_sum(double v) {
  __shared__ double parts[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_down_sync(0xffffffffu, v, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += parts[warp];
  return total;
}

}  // namespace poisonshield
