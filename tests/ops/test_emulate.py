"""The emulation of CUDA that other tests rely on: it computes, and it tells of what a GPU would not forgive."""

import os
import subprocess

import pytest
from ops.emulate import emulate

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))

SOURCE = r"""
#include <cuda_runtime.h>
#include <string>

// Sums of 64 numbers: a shuffle within warps, shared memory between them.
template <bool kSync>
__global__ void __launch_bounds__(64) add_up(const float* v, float* out) {
  __shared__ float parts[64];
  parts[threadIdx.x] = v[blockIdx.x * blockDim.x + threadIdx.x];
  if constexpr (kSync) __syncthreads();
  float sum = parts[63 - threadIdx.x];
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = parts[0] + parts[1];
}

__global__ void past_the_end(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void past_shared() {
  extern __shared__ float room[];
  room[threadIdx.x] = 1.0f;
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 16) __syncwarp();
  if (threadIdx.x >= 16) __syncthreads();
}

__global__ void absent_lanes() { __syncwarp(0x1ffffffu); }

__global__ void crooked(const float* v, float* out) { *reinterpret_cast<float4*>(out) = {v[0], v[1], v[2], v[3]}; }

int main(int, char** names) {
  const std::string name = names[1];
  std::unique_ptr<float[]> v(new float[128]), out(new float[5]);
  for (int i = 0; i < 128; ++i) v[i] = i;
  if (name == "add") add_up<true><<<2, 64>>>(v.get(), out.get());
  if (name == "race") add_up<false><<<2, 64>>>(v.get(), out.get());
  if (name == "bounds") past_the_end<<<1, 32>>>(out.get());
  if (name == "shared") past_shared<<<dim3(1), 33, 32 * sizeof(float), nullptr>>>();
  if (name == "barrier") half_a_barrier<<<1, 64>>>();
  if (name == "lanes") absent_lanes<<<1, 24>>>();
  if (name == "alignment") crooked<<<1, 1>>>(v.get(), out.get() + 1);
  if (name == "grid") past_shared<<<dim3(1, 65536), 1>>>();
  std::printf("%g %g\n", out[0], out[1]);
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    program = emulate.program(tmp_path_factory.mktemp("emulated"), SOURCE)

    def started(name, order="ascending"):
        return subprocess.run(
            [program, name], capture_output=True, text=True, env=os.environ | {"EMULATE_ORDER": order}, check=False
        )

    return started


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_blocks_of_several_warps_add_up(run, order):
    done = run("add", order)
    assert done.stdout.split() == [str(sum(range(64))), str(sum(range(64, 128)))], done.stderr


def test_a_missing_barrier_shows_in_the_other_order(run):
    assert run("race").stdout != run("race", "descending").stdout


@pytest.mark.parametrize(
    "name, told",
    [
        ("bounds", "heap-buffer-overflow"),
        ("shared", "heap-buffer-overflow"),
        ("barrier", "wait at a barrier or a shuffle for others that never come"),
        ("lanes", "a mask names lanes that are not there or have left"),
        ("alignment", "misaligned address"),
        ("grid", "a launch of 65536 blocks"),
    ],
)
def test_what_a_gpu_would_not_forgive_is_told(run, name, told):
    done = run(name)
    assert done.returncode != 0 and told in done.stderr
