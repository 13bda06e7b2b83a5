// Differentiable and exact JPEG on the CPU: one pass over the pixels, band by band, in the cache. Called through a plain
// C interface, so that it is built without torch. Semantics: poisonshield/ops/jpeg/reference.py and exact.py.
#include "jpeg.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

#include "threads.h"

#define POISONSHIELD_KERNELS "jpeg_kernels.h"
#include "levels.h"

namespace poisonshield {
namespace {

constexpr int64_t kWorthAThread = 1 << 14;  // pixels
constexpr int64_t kLeastBands = 4;          // of a stretch: each costs up to two bands more than it gives

typedef void Kernel(const JpegCall&, const Sizes&, const Stretch&);

// Pictures are dealt to threads whole, or in stretches where there are fewer than threads. A pixel's bits do not depend
// on that.
void run(const JpegCall& call, Kernel* kernel) {
  const Sizes sizes(call);
  const int64_t worth = std::max<int64_t>(1, call.batch * call.height * call.width / kWorthAThread);
  const int64_t threads = std::min(std::max<int64_t>(1, call.threads), worth);
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + call.batch - 1) / call.batch;
  const int64_t length = std::max(kLeastBands, (sizes.bands + wanted - 1) / wanted);
  const int64_t parts = (sizes.bands + length - 1) / length;
  in_parallel(call.batch * parts, threads, [&](int64_t unit) {
    const int64_t first = unit % parts * length;
    kernel(call, sizes, {unit / parts, first, std::min(first + length, sizes.bands)});
  });
}

int guarded(const JpegCall* call, Kernel* kernel) {
  if (call->size != sizeof(JpegCall)) return 2;
  try {
    run(*call, kernel);
    return 0;
  } catch (const std::exception&) {  // memory, which is all that can be short
    return 1;
  }
}

}  // namespace
}  // namespace poisonshield

extern "C" {

// 0, or 1 where memory is short, or 2 for a record of another version.
__attribute__((visibility("default"))) int poisonshield_jpeg(const poisonshield::JpegCall* call) {
  using namespace poisonshield;
  return guarded(call, call->exact ? POISONSHIELD_BEST(exact_forward) : POISONSHIELD_BEST(smooth_forward));
}

__attribute__((visibility("default"))) int poisonshield_jpeg_backward(const poisonshield::JpegCall* call) {
  using namespace poisonshield;
  return guarded(call, POISONSHIELD_BEST(smooth_backward));
}
}
