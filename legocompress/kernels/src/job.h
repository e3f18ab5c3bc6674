// What the library's functions share: the kernels of this CPU, scratch memory, and the distribution of
// work to threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>

#include "calls.h"
#include "lego.h"
#include "threads.h"

namespace lego {

// The best kernels that run on this CPU; null if LEGOCOMPRESS_ISA names kernels that do not.
const Kernel* kernel();

// Memory for floats, aligned to cache lines. It grows on demand and is kept; each thread has its own.
class Buffer {
 public:
  ~Buffer() { std::free(raw_); }
  // Room for n floats, whose old values may be lost; null if there is not enough memory.
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
// The scratch memory of the calling thread, for its work on one item.
Buffer& thread_scratch();

// Distributes items to threads. Each thread has one range of items, so that it finds in its own cache what
// it wrote there one layer before; a thread that is done with its range helps with the others.
class WorkQueue {
 public:
  void start(int64_t items, int threads) {
    n_ = std::min(threads, kMaxRanges);
    for (int i = 0; i < n_; i++) {
      ranges_[i].next = items * i / n_;
      ranges_[i].end = items * (i + 1) / n_;
    }
  }

  // The next item, or -1 if none is left.
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
  static constexpr int kMaxRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Range ranges_[kMaxRanges];
  int n_;
};

// a * b, or a very large number if that would overflow; a and b are at least 0.
inline int64_t multiply_saturating(int64_t a, int64_t b) {
  return b && a > INT64_MAX / 4 / b ? INT64_MAX / 4 : a * b;
}

inline bool are_valid_sizes(std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [](int64_t v) { return v >= 1 && v <= INT32_MAX; });
}

// Rows or columns of the output of a conv or pooling; -1 if the kernel is larger than the input.
inline int64_t output_size(int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? -1 : room / stride + 1;
}

}  // namespace lego
