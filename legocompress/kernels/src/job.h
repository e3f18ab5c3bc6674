// What the library's functions share: the kernels of this CPU, scratch memory, and work dealt out to
// threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>

#include "calls.h"
#include "lego.h"
#include "threads.h"

namespace lego {

// The best kernels that run here, or null: LEGOCOMPRESS_ISA names none that can.
const Kernel* kernel();

// Floats on a cache line's boundary that grow and stay: one a thread.
class Buffer {
 public:
  ~Buffer() { std::free(raw_); }
  // Null where there is no memory.
  float* floats(int64_t n) {
    if (n > size_) {
      std::free(raw_);
      raw_ = std::malloc(static_cast<size_t>(n) * 4 + 64);
      size_ = raw_ ? n : 0;
    }
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t{63});
  }

 private:
  void* raw_ = nullptr;
  int64_t size_ = 0;
};
// Of each thread; its floats are what it needs while it works on one item.
Buffer& thread_scratch();

// Items dealt out in one range a thread, so that a thread finds in its own cache what it wrote there
// a layer before; whoever is done with its range helps with the others.
class Deal {
 public:
  void start(int64_t items, int threads) {
    n_ = std::min(threads, kMostRanges);
    for (int i = 0; i < n_; i++) {
      ranges_[i].next = items * i / n_;
      ranges_[i].end = items * (i + 1) / n_;
    }
  }

  // The next item, or -1 where none is left.
  int64_t take() {
    for (int i = 0; i < n_; i++) {
      Range& range = ranges_[(thread_number() + i) % n_];
      if (range.next.load(std::memory_order_relaxed) >= range.end) continue;
      const int64_t item = range.next++;
      if (item < range.end) return item;
    }
    return -1;
  }

 private:
  static constexpr int kMostRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Range ranges_[kMostRanges];
  int n_;
};

inline int64_t multiply(int64_t a, int64_t b) {  // saturating; both at least 0
  return b && a > INT64_MAX / 4 / b ? INT64_MAX / 4 : a * b;
}

inline bool are_sizes(std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [](int64_t v) { return v >= 1 && v <= INT32_MAX; });
}

inline int64_t out_size(int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? -1 : room / stride + 1;
}

}  // namespace lego
