// Work on several threads. They are started for the call and joined before it returns: some 20 microseconds each, and in
// return a fork, an exit of the interpreter or torch's own threads never meet a pool that waits.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace poisonshield {

// work(unit) for each unit in 0 .. units-1, in any order, on up to `threads` threads, the caller's among them. What a
// call throws is thrown here once all threads are done.
template <class Work>
void in_parallel(int64_t units, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto run = [&] {
    try {
      for (int64_t unit = next++; unit < units && !failed; unit = next++) work(unit);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads > 0 ? threads : 0);
  try {
    for (int64_t i = 1; i < threads && i < units; ++i) others.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads are to be had: those that run do all the work
  }
  run();
  for (auto& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace poisonshield
