// The kernels of this CPU, and runs of several calls.
#include <cstring>

#include "job.h"

namespace lego {
namespace {

bool cpu_runs(const char* isa) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (!std::strcmp(isa, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  }
#endif
  return std::strcmp(isa, "avx2") && std::strcmp(isa, "avx512");
}

// The best of this build that this CPU runs; LEGOCOMPRESS_ISA asks for one by name.
const Kernel* choose_kernel() {
  const Kernel* all[] = {avx512_kernel(), avx2_kernel(), neon_kernel(), portable_kernel()};
  const char* asked = std::getenv("LEGOCOMPRESS_ISA");
  for (const Kernel* kernel : all) {
    if (!kernel || !cpu_runs(kernel->name)) continue;
    if (!asked || !*asked || !std::strcmp(asked, kernel->name)) return kernel;
  }
  return nullptr;
}

}  // namespace

const Kernel* kernel() {
  static const Kernel* chosen = choose_kernel();
  return chosen;
}

Buffer& thread_scratch() {
  thread_local Buffer buffer;
  return buffer;
}

}  // namespace lego

// The name of the kernels that run here, or null: LEGOCOMPRESS_ISA names none that can.
EXPORT const char* lego_isa() {
  const lego::Kernel* k = lego::kernel();
  return k ? k->name : nullptr;
}

namespace {
template <class Call>
int64_t run_next(int64_t (*function)(const Call*), const int64_t*& at, const int64_t* end) {
  constexpr int64_t kWords = sizeof(Call) / 8;
  if (kWords > end - at) return lego::kBadCall;
  const Call* call = reinterpret_cast<const Call*>(at);
  at += kWords;
  return function(call);
}
}  // namespace

// Other calls one after the other, each the number of its function and its struct; returns the first
// Status that is not kDone.
EXPORT int64_t lego_run(const RunCall* c) {
  int64_t status = lego::kDone;
  for (const int64_t *at = c->code, *end = at + c->words; at < end && status == lego::kDone;) {
    switch (*at++) {
      case 0: status = run_next(lego_conv2d, at, end); break;
      case 1: status = run_next(lego_max_pool2d, at, end); break;
      case 2: status = run_next(lego_means, at, end); break;
      case 3: status = run_next(lego_linear, at, end); break;
      case 4: status = run_next(lego_depthwise, at, end); break;
      default: status = lego::kBadCall;
    }
  }
  return status;
}
