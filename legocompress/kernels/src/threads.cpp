// The library's own thread pool. A caller never waits for a thread that has not joined its job: on a busy
// core the thread may start milliseconds late, when the caller has already done the work. OpenMP's threads,
// PyTorch's too, all meet at the end of each job, so that every layer would wait for the busiest core.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace lego {
namespace {

// A forked child does not have its parent's threads, so it runs on one thread.
std::atomic<bool> g_forked{false};

#ifndef _WIN32
struct AtFork {
  AtFork() {
    pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
  }
} g_at_fork;
#endif

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Polls before a thread sleeps. About 50 microseconds: longer than the time between two layers of a network.
constexpr int kSpins = 4000;

thread_local int t_number = 0;

// The pool runs one job at a time; a second caller meanwhile does its work alone.
class Pool {
 public:
  void run(int threads, void (*work)(void*), void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return work(context);
    try {
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int number = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, number] {
          t_number = number;
          serve();
        });
      }
    } catch (const std::system_error&) {
      // The system gives no more threads: the job runs on those that exist.
    }
    work_ = work;
    context_ = context;
    const uint64_t job = (state_.load() / kJob + 1) * kJob;
    state_ = job + static_cast<uint64_t>(threads - 1) * kPlace;
    if (asleep_) {
      std::lock_guard<std::mutex> hold(mutex_);
      wake_.notify_all();
    }
    work(context);
    // From here on no thread may join. Wait for those that have.
    uint64_t now = state_.load();
    while (!state_.compare_exchange_weak(now, now & ~(kPlaces * kPlace))) {
    }
    for (int i = 0; i < kSpins; i++) {
      if (state_.load(std::memory_order_acquire) == job) return;
      pause();
    }
    std::unique_lock<std::mutex> hold(mutex_);
    done_.wait(hold, [&] { return state_.load() == job; });
  }

 private:
  // The state in one word: the number of the job, its free places, and the number of threads at work.
  // In this order, from the highest bits; the last two have 12 bits each.
  static constexpr uint64_t kPlace = 1 << 12, kPlaces = kPlace - 1, kJob = kPlace << 12;

  void serve() {
    for (;;) {
      if (!join()) {
        std::unique_lock<std::mutex> hold(mutex_);
        asleep_++;
        wake_.wait(hold, [this] { return places(state_.load()) > 0; });
        asleep_--;
        continue;
      }
      work_(context_);
      if ((state_.fetch_sub(1) & kPlaces) == 1) {
        // Lock and unlock, so that a caller that is about to sleep is asleep before it is notified.
        { std::lock_guard<std::mutex> hold(mutex_); }
        done_.notify_one();
      }
    }
  }

  static uint64_t places(uint64_t state) { return state / kPlace & kPlaces; }

  // Takes a place of a job; false if there is none for kSpins polls.
  bool join() {
    uint64_t now = state_.load();
    for (int i = 0; i < kSpins; i++) {
      while (places(now) > 0) {
        if (state_.compare_exchange_weak(now, now - kPlace + 1)) return true;
      }
      pause();
      now = state_.load(std::memory_order_relaxed);
    }
    return false;
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> asleep_{0};
};

Pool& pool() {
  static Pool* the_pool = new Pool;  // never destroyed: its workers may outlive main
  return *the_pool;
}

}  // namespace

int thread_number() { return t_number; }

void run_on_threads(int threads, void (*work)(void*), void* context) {
  if (threads <= 1 || g_forked) return work(context);
  pool().run(threads, work, context);
}

}  // namespace lego
