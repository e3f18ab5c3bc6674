// Threads. A second OpenMP runtime, or a pool beside PyTorch's, would fight with PyTorch's own
// threads, which spin for some time after each of its operators: so its runtime is borrowed.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace lego {
namespace {

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> g_gomp{nullptr};
// A forked child has none of its parent's threads, and OpenMP hangs there: it runs on one thread.
std::atomic<bool> g_forked{false};

#ifndef _WIN32
struct AtFork {
  AtFork() {
    pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
  }
} g_at_fork;
#endif

// Workers that sleep between jobs. One job at a time; a second caller runs alone meanwhile.
class Pool {
 public:
  void run(int threads, void (*work)(void*), void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return work(context);
    {
      std::lock_guard<std::mutex> hold(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int number = static_cast<int>(workers_.size());
        workers_.emplace_back([this, number] { serve(number); });
      }
      work_ = work;
      context_ = context;
      wanted_ = running_ = threads - 1;
      job_++;
    }
    wake_.notify_all();
    work(context);
    std::unique_lock<std::mutex> hold(mutex_);
    done_.wait(hold, [this] { return running_ == 0; });
  }

 private:
  void serve(int number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      wake_.wait(hold, [&] { return job_ != seen; });
      seen = job_;
      if (number >= wanted_) continue;
      hold.unlock();
      work_(context_);
      hold.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0, running_ = 0;
  uint64_t job_ = 0;
};

Pool& pool() {
  static Pool* only = new Pool;  // never destroyed: its workers may outlive main
  return *only;
}

}  // namespace

void use_openmp(void* gomp_parallel) { g_gomp = reinterpret_cast<GompParallel>(gomp_parallel); }

void on_threads(int threads, void (*work)(void*), void* context) {
  if (threads <= 1 || g_forked) return work(context);
  if (GompParallel gomp = g_gomp) return gomp(work, context, static_cast<unsigned>(threads), 0);
  pool().run(threads, work, context);
}

}  // namespace lego
