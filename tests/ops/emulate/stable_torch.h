// Put in front of a source by emulate.py: torch's stable interface with a device guard and a stream that need no GPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedGuard

inline int32_t emulated_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
#define aoti_torch_get_current_cuda_stream emulated_stream
