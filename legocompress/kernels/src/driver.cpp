// Chooses the kernels for this CPU, and runs recorded calls.
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

// The best kernels of this build that run on this CPU, or those that LEGOCOMPRESS_ISA names. The names of
// instruction sets that only int8 kernels use choose the float kernels of the set that they extend.
const Kernel* choose_kernel() {
  const Kernel* all[] = {avx512_kernel(), avx2_kernel(), neon_kernel(), portable_kernel()};
  const char* requested = std::getenv("LEGOCOMPRESS_ISA");
  if (requested && (!std::strcmp(requested, "amx") || !std::strcmp(requested, "avx512_vnni"))) {
    requested = "avx512";
  }
  if (requested && !std::strcmp(requested, "avx_vnni")) requested = "avx2";
  for (const Kernel* kernel : all) {
    if (!kernel || !cpu_runs(kernel->name)) continue;
    if (!requested || !*requested || !std::strcmp(requested, kernel->name)) return kernel;
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

// The name of the kernels in use; null if LEGOCOMPRESS_ISA names kernels that do not run on this CPU.
EXPORT const char* lego_isa() {
  const lego::Kernel* k = lego::kernel();
  return k ? k->name : nullptr;
}

namespace {
// Calls the function with the struct at `at`, and moves `at` past it.
template <class Call>
int64_t run_next_call(int64_t (*function)(const Call*), const int64_t*& at, const int64_t* end) {
  constexpr int64_t kWords = sizeof(Call) / 8;
  if (kWords > end - at) return lego::kBadCall;
  const Call* call = reinterpret_cast<const Call*>(at);
  at += kWords;
  return function(call);
}
}  // namespace

// Runs recorded calls in order, each the number of its function and its struct (tape.py writes them).
// Stops at the first Status that is not kDone, and returns it.
EXPORT int64_t lego_run(const RunCall* c) {
  int64_t status = lego::kDone;
  for (const int64_t *at = c->code, *end = at + c->words; at < end && status == lego::kDone;) {
    switch (*at++) {
      case 0: status = run_next_call(lego_conv2d, at, end); break;
      case 1: status = run_next_call(lego_max_pool2d, at, end); break;
      case 2: status = run_next_call(lego_means, at, end); break;
      case 3: status = run_next_call(lego_linear, at, end); break;
      case 4: status = run_next_call(lego_depthwise, at, end); break;
      case 5: status = run_next_call(lego_int8_conv, at, end); break;
      case 6: status = run_next_call(lego_int8_add, at, end); break;
      case 7: status = run_next_call(lego_int8_scale, at, end); break;
      case 8: status = run_next_call(lego_int8_table, at, end); break;
      case 9: status = run_next_call(lego_int8_copy, at, end); break;
      case 10: status = run_next_call(lego_int8_max_pool, at, end); break;
      case 11: status = run_next_call(lego_int8_mean, at, end); break;
      case 12: status = run_next_call(lego_int8_quantize, at, end); break;
      case 13: status = run_next_call(lego_int8_dequantize, at, end); break;
      case 14: status = run_next_call(lego_int8_linear, at, end); break;
      default: status = lego::kBadCall;
    }
  }
  return status;
}
