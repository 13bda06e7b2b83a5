// CUDA kernels as plain C++: what a .cu file needs from the toolkit, so that sanitizers can look at it without a GPU.
//
// A block's threads are fibers of one OS thread; blocks run one after the other. A fiber runs until it reaches a
// barrier or a shuffle, then the next one does, in ascending order or, with EMULATE_ORDER=descending, the other way: a
// result that depends on it lacks a barrier. Threads that wait for others which never come end the process.
// emulate.py rewrites `kernel<<<grid, block, shared, stream>>>(` to `emulate::launch(kernel, grid, ...)(`, and
// `extern __shared__ T name[]` to a pointer; nothing else of a source changes.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#define POISONSHIELD_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
  constexpr dim3(long long x = 1, long long y = 1, long long z = 1)  // the grid's limits are those of sm_90
      : x(fits(x, 0x7fffffff)), y(fits(y, 65535)), z(fits(z, 65535)) {}
  static constexpr unsigned int fits(long long n, long long most) {
    if (n < 1 || n > most) {
      std::fprintf(stderr, "emulate: a launch of %lld blocks or threads, where 1 to %lld are allowed\n", n, most);
      std::abort();
    }
    return n;
  }
};

#include "vectors.h"  // float4 and its kind

typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

namespace emulate {

constexpr size_t kStack = 64 << 10, kPage = 4096;
constexpr int kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulate: %s\n", what);
  std::abort();
}

// Arrivals of threads; all leave together once `expected` have come.
struct Barrier {
  int arrived = 0;
  int64_t round = 0;
};

// Lanes that exchange values. They show them in turn in two rows: who writes to one again knows that it was read.
struct Exchange {
  Barrier barrier;
  uint64_t slots[2][kWarp];
};

struct Warp {
  std::map<uint32_t, Exchange> exchanges;  // one for each set of lanes
  uint32_t live = 0;                       // lanes that have not left the kernel
};

// Memory of a fiber's stack, below it a page that cannot be written.
class Stack {
 public:
  Stack() {
    void* at = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) fail("no memory for the threads of a block");
    start_ = static_cast<char*>(at);
    mprotect(start_, kPage, PROT_NONE);
  }
  Stack(Stack&& other) : start_(std::exchange(other.start_, nullptr)) {}
  ~Stack() {
    if (start_ != nullptr) munmap(start_, kPage + kStack);
  }
  char* get() const { return start_ + kPage; }

 private:
  char* start_ = nullptr;
};

struct Fiber {
  ucontext_t context;
  Stack stack;
  uint3 index;
  int number = 0;
  bool done = false;
  const Barrier* waits = nullptr;  // for the end of its round `round`
  int64_t round = 0;
  void* fake = nullptr;  // the sanitizer's own stack
};

struct Block {
  uint3 block, grid, size;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int live = 0;
  Fiber* now = nullptr;
  ucontext_t scheduler;
  const void* bottom = nullptr;  // of the scheduler's stack
  size_t length = 0;
  std::function<void()> work;
  std::unique_ptr<char[]> shared;
};

inline Block block;

inline Warp& warp() { return block.warps[block.now->number / kWarp]; }
inline int lane() { return block.now->number % kWarp; }

inline void back_to_scheduler(Fiber& fiber) {
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake, block.bottom, block.length);
  swapcontext(&fiber.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake, &block.bottom, &block.length);
}

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.round;
}

inline void arrive(Barrier& barrier, int expected) {
  const int64_t round = barrier.round;
  if (++barrier.arrived >= expected) {
    release(barrier);
    return;
  }
  Fiber& fiber = *block.now;
  fiber.waits = &barrier;
  fiber.round = round;
  back_to_scheduler(fiber);
}

inline void enter() {
  Fiber& fiber = *block.now;
  __sanitizer_finish_switch_fiber(nullptr, &block.bottom, &block.length);
  block.work();
  fiber.done = true;
  warp().live &= ~(1u << lane());
  --block.live;
  if (block.barrier.arrived > 0 && block.barrier.arrived >= block.live) release(block.barrier);
  back_to_scheduler(fiber);
}

inline void prepare(Fiber& fiber, int number, const dim3& size) {
  fiber.number = number;
  fiber.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
  fiber.done = false;
  fiber.waits = nullptr;
  fiber.fake = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &enter, 0);
}

inline bool resume(Fiber& fiber) {
  if (fiber.done || (fiber.waits != nullptr && fiber.waits->round == fiber.round)) return false;
  fiber.waits = nullptr;
  block.now = &fiber;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
  swapcontext(&block.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  return true;
}

inline void run_block(const dim3& size) {
  const int threads = size.x * size.y * size.z;
  static const char* order = std::getenv("EMULATE_ORDER");
  static const bool descending = order != nullptr && std::string(order) == "descending";
  if (threads > 1024) fail("a block of more than 1024 threads");
  if (int(block.fibers.size()) < threads) block.fibers = std::vector<Fiber>(threads);
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  block.barrier = Barrier();
  block.live = threads;
  for (int i = 0; i < threads; ++i) {
    prepare(block.fibers[i], i, size);
    block.warps[i / kWarp].live |= 1u << i % kWarp;
  }
  while (block.live > 0) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) moved |= resume(block.fibers[descending ? threads - 1 - i : i]);
    if (!moved && block.live > 0) fail("threads wait at a barrier or a shuffle for others that never come");
  }
}

// launch(kernel, grid, block, shared bytes, stream)(arguments of the kernel)
template <class... Taken>
auto launch(void (*kernel)(Taken...), dim3 grid, dim3 size, size_t shared = 0, cudaStream_t = nullptr) {
  return [=](Taken... given) {
    block.grid = {grid.x, grid.y, grid.z};
    block.size = {size.x, size.y, size.z};
    block.work = [&] { kernel(given...); };
    for (unsigned int z = 0; z < grid.z; ++z) {
      for (unsigned int y = 0; y < grid.y; ++y) {
        for (unsigned int x = 0; x < grid.x; ++x) {
          block.block = {x, y, z};
          block.shared.reset(shared ? new char[shared] : nullptr);  // of this length, so that a sanitizer sees its end
          std::fill_n(block.shared.get(), shared, char(0xff));      // NaN
          run_block(size);
        }
      }
    }
  };
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block.shared.get());
}

// The row of slots in which this lane has to show what it has, before `meet` with the same lanes.
inline uint64_t* row(uint32_t lanes) {
  Exchange& e = warp().exchanges[lanes];
  return e.slots[e.barrier.round & 1];
}

inline void meet(uint32_t lanes) {
  if (!(lanes >> lane() & 1)) fail("a lane is not in the mask that it gives");
  if (lanes & ~warp().live) fail("a mask names lanes that are not there or have left");
  arrive(warp().exchanges[lanes].barrier, __builtin_popcount(lanes));
}

// What lane `from(own lane)` shows; a lane's own value where that one is outside of its group of `width` lanes.
template <class T, class From>
T shuffled(uint32_t lanes, T value, int width, const From& from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int own = lane(), base = own / width * width, other = from(own);
  uint64_t* slots = row(lanes);
  memcpy(&slots[own], &value, sizeof value);
  meet(lanes);
  if (other >= base && other < base + width) {
    if (!(lanes >> other & 1)) fail("a shuffle reads from a lane that takes no part");
    memcpy(&value, &slots[other], sizeof value);
  }
  return value;
}

}  // namespace emulate

#define threadIdx (emulate::block.now->index)
#define blockIdx (emulate::block.block)
#define blockDim (emulate::block.size)
#define gridDim (emulate::block.grid)
constexpr int warpSize = emulate::kWarp;

inline void __syncthreads() { emulate::arrive(emulate::block.barrier, emulate::block.live); }
inline void __syncwarp(uint32_t lanes = 0xffffffffu) { emulate::meet(lanes); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline uint32_t __activemask() { return emulate::warp().live; }

template <class T>
T __shfl_sync(uint32_t lanes, T value, int source, int width = 32) {
  return emulate::shuffled(lanes, value, width, [=](int own) { return own / width * width + (source & (width - 1)); });
}
template <class T>
T __shfl_down_sync(uint32_t lanes, T value, unsigned int by, int width = 32) {
  return emulate::shuffled(lanes, value, width, [=](int own) { return own + int(by); });
}
template <class T>
T __shfl_up_sync(uint32_t lanes, T value, unsigned int by, int width = 32) {
  return emulate::shuffled(lanes, value, width, [=](int own) { return own - int(by); });
}
template <class T>
T __shfl_xor_sync(uint32_t lanes, T value, int with, int width = 32) {
  return emulate::shuffled(lanes, value, width, [=](int own) { return own ^ with; });
}
inline uint32_t __ballot_sync(uint32_t lanes, int vote) {
  uint64_t* slots = emulate::row(lanes);
  slots[emulate::lane()] = vote != 0;
  emulate::meet(lanes);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= uint32_t(lanes >> i & 1 && slots[i] != 0) << i;
  return votes;
}
inline int __any_sync(uint32_t lanes, int vote) { return __ballot_sync(lanes, vote) != 0; }
inline int __all_sync(uint32_t lanes, int vote) { return __ballot_sync(lanes, vote) == lanes; }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

// Compiled with -ffp-contract=off, so that every operation rounds once, as these do.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline int __float2int_rn(float a) { return int(rintf(a)); }
inline int __float2int_rz(float a) { return int(a); }
inline int __float2int_rd(float a) { return int(floorf(a)); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint_as_float(uint32_t a) { return std::bit_cast<float>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }
inline uint32_t __float_as_uint(float a) { return std::bit_cast<uint32_t>(a); }
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline int __popc(uint32_t a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float cospif(float a) { return float(cos(M_PI * double(a))); }
inline float sinpif(float a) { return float(sin(M_PI * double(a))); }
inline void sincospif(float a, float* s, float* c) { *s = sinpif(a), *c = cospif(a); }
inline float __saturatef(float a) { return a < 0.0f ? 0.0f : a > 1.0f ? 1.0f : a == a ? a : 0.0f; }
using std::max;
using std::min;
using std::isfinite;
using std::isinf;
using std::isnan;

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
