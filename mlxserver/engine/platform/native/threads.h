// Threads that help with one product at a time; a product that finds them busy is computed by its own thread alone, so
// that models that run beside each other do not take more cores than there are.
//
// Rule 1: what the caller waits for are pieces that a helper has begun, never a helper that has yet to wake up.
// Rule 2: nothing is allocated for a product and no piece throws: it would end the process. Where the system grants no
//         more threads there are fewer helpers.
#pragma once
#include <sched.h>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Helpers {
 public:
  explicit Helpers(int count) {
    try {
      for (; count_ < count; count_++) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  // Call work(piece) for every piece. Blocks.
  template <typename Work>
  void run(int64_t pieces, const Work& work) noexcept {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!count_ || pieces < 2 || !turn.owns_lock()) {
      for (int64_t i = 0; i < pieces; i++) work(i);
      return;
    }
    Job job{{0}, pieces, &work, [](const void* own, int64_t piece) { (*static_cast<const Work*>(own))(piece); }};
    job_ = &job;
    ++calls_;
    if (asleep_) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    job.take();
    job_ = nullptr;
    for (int spins = 0; inside_; spins++) spins < 2000 ? relax() : std::this_thread::yield();
  }

 private:
  struct Job {
    std::atomic<int64_t> next;
    int64_t pieces;
    const void* work;
    void (*call)(const void* work, int64_t piece);
    void take() {
      for (int64_t i; (i = next++) < pieces;) call(work, i);
    }
  };

  // Between the products of a step lie some tens of microseconds: less than waking up takes.
  void await(uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(40);
    while (std::chrono::steady_clock::now() < end)
      for (int i = 0; i < 32; i++) {
        if (calls_ != seen) return;
        relax();
      }
    std::unique_lock<std::mutex> lock(sleep_);
    ++asleep_;
    wake_.wait(lock, [&] { return calls_ != seen; });
    --asleep_;
  }

  void help() noexcept {
    for (uint64_t seen = 0;;) {
      await(seen);
      seen = calls_;
      ++inside_;
      if (Job* job = job_) job->take();
      --inside_;
    }
  }

  int count_ = 0;  // set before the first product
  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<Job*> job_{nullptr};
  std::atomic<uint64_t> calls_{0};
  std::atomic<int> asleep_{0}, inside_{0};
};

// One less than the cores that this process may use, at most 15: the calling thread computes, too. Never destroyed.
inline Helpers& helpers() {
  static Helpers* all = [] {
    cpu_set_t cores;
    int count = sched_getaffinity(0, sizeof cores, &cores) ? 1 : CPU_COUNT(&cores);
    return new Helpers((count < 16 ? count : 16) - 1);
  }();
  return *all;
}
