// The other quantised layers, and the choice of the int8 kernels.
#include <cstring>

#include "int8_job.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lego {
namespace {

// From the best to the slowest.
const Int8Kernel* int8_kernel_of(int64_t number) {
  const Int8Kernel* all[] = {int8_amx_kernel(),      int8_avx512_vnni_kernel(), int8_avx512_kernel(),
                             int8_avx_vnni_kernel(), int8_avx2_kernel(),        int8_portable_kernel()};
  return number >= 0 && number < 6 ? all[number] : nullptr;
}

#if defined(__x86_64__) || defined(__i386__)
struct Registers {
  uint32_t a, b, c, d;
};
Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r{};
  asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "0"(leaf), "2"(sub));
  return r;
}

// Asks the system for the use of AMX's tile registers, once per process.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  static const bool allowed = [] {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}
#endif

bool cpu_runs_int8(const char* isa) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(isa, "avx2")) return avx2;
  if (!std::strcmp(isa, "avx512")) return avx512;
  if (!std::strcmp(isa, "avx512_vnni")) return vnni;
  const bool leaf7 = cpuid(0, 0).a >= 7;
  if (!std::strcmp(isa, "avx_vnni")) return avx2 && leaf7 && cpuid(7, 0).a >= 1 && (cpuid(7, 1).a >> 4 & 1);
  if (!std::strcmp(isa, "amx")) {
    const bool tiles = leaf7 && (cpuid(7, 0).d >> 24 & 3) == 3;  // AMX-TILE and AMX-INT8
    return vnni && __builtin_cpu_supports("avx512vbmi") && tiles && may_use_tiles();
  }
#endif
  return !std::strcmp(isa, "portable");
}

const Int8Kernel* choose_int8_kernel() {
  const char* requested = std::getenv("LEGOCOMPRESS_ISA");
  // Float kernels that have no int8 kernels of their name.
  if (requested && !std::strcmp(requested, "neon")) requested = "portable";
  for (int64_t i = 0; i < 6; i++) {
    const Int8Kernel* k = int8_kernel_of(i);
    if (!k || (requested && *requested && std::strcmp(requested, k->name))) continue;
    if (cpu_runs_int8(k->name)) return k;
  }
  return nullptr;
}

// Work on ranges of planes, blocks or images.
struct RangeJob {
  WorkQueue items;
  int64_t total, size;
  void (*work)(RangeJob&, int64_t first, int64_t last);
  const void* layer;
  const Int8Kernel* kernel;
  const void* call;
  std::atomic<bool> failed{false};
};

void run_ranges(void* context) {
  RangeJob& job = *static_cast<RangeJob*>(context);
  for (int64_t item; (item = job.items.take()) >= 0 && !job.failed;) {
    job.work(job, item * job.size, std::min(job.total, (item + 1) * job.size));
  }
}

// Splits `total` planes into at most four ranges per thread.
Status run_planes(RangeJob& job, int64_t total, int64_t threads) {
  job.total = total;
  job.size = threads == 1 ? total : std::max<int64_t>(1, total / (4 * threads));
  const int64_t items = (total + job.size - 1) / job.size;
  job.items.start(items, static_cast<int>(std::min(threads, items)));
  run_on_threads(static_cast<int>(std::min(threads, items)), run_ranges, &job);
  return job.failed ? kNoMemory : kDone;
}

Status run_elementwise(const Int8Elementwise& e, const Int8Kernel* k, int64_t threads,
                       void (*work)(RangeJob&, int64_t, int64_t)) {
  RangeJob job;
  job.work = work;
  job.layer = &e;
  job.kernel = k;
  return run_planes(job, e.batch * e.at.quads, threads);
}

template <class T>
const T& layer_of(const RangeJob& job) {
  return *static_cast<const T*>(job.layer);
}

template <class Call>
bool has_valid_maps(const Call& c) {
  return are_valid_maps(c.batch, c.channels, c.height, c.width, c.border) && are_valid_sizes({c.threads});
}

float to_float(int64_t bits) {
  const uint32_t low = static_cast<uint32_t>(bits);
  float f;
  std::memcpy(&f, &low, 4);
  return f;
}

}  // namespace

const Int8Kernel* int8_kernel(int64_t isa) {
  static const Int8Kernel* best = choose_int8_kernel();
  if (!isa) return best;
  const Int8Kernel* k = int8_kernel_of(isa - 1);
  return k && cpu_runs_int8(k->name) ? k : nullptr;
}

}  // namespace lego

EXPORT const char* lego_int8_isa(int64_t number) {
  const lego::Int8Kernel* best = lego::int8_kernel(0);
  if (number < 0) return best ? best->name : nullptr;
  static const char* const names[] = {"amx", "avx512_vnni", "avx512", "avx_vnni", "avx2", "portable"};
  return number < 6 ? names[number] : nullptr;
}

EXPORT int64_t lego_int8_runs(int64_t number) { return number >= 0 && lego::int8_kernel(number + 1) != nullptr; }

EXPORT int64_t lego_int8_add(const Int8AddCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!has_valid_maps(*c) || !are_bytes({c->out_zero, c->a_zero, c->b_zero, c->low, c->high}) ||
      !are_16_bit({c->a_multiplier, c->b_multiplier, c->bias}) || c->out_shift < 0 || c->out_shift > 15) {
    return kBadCall;
  }
  const Int8Elementwise e{c->a + kMapSlack, c->b + kMapSlack, nullptr, c->y + kMapSlack,
                          locate_pixels(c->channels, c->height, c->width, c->border), c->batch, c->channels,
                          c->a_zero, c->b_zero, c->a_multiplier, c->b_multiplier, c->bias, c->out_shift, c->low,
                          c->high, c->out_zero};
  return run_elementwise(e, k, c->threads, [](RangeJob& job, int64_t first, int64_t last) {
    job.kernel->add(layer_of<Int8Elementwise>(job), first, last);
  });
}

EXPORT int64_t lego_int8_scale(const Int8ScaleCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!has_valid_maps(*c) || !are_bytes({c->out_zero, c->x_zero, c->gate_zero}) || !are_16_bit({c->bias}) ||
      c->multiplier < INT32_MIN / 256 || c->multiplier > INT32_MAX / 256 || c->out_shift < 0 || c->out_shift > 15) {
    return kBadCall;
  }
  const Int8Elementwise e{c->x + kMapSlack, c->gate + kMapSlack, nullptr, c->y + kMapSlack,
                          locate_pixels(c->channels, c->height, c->width, c->border), c->batch, c->channels,
                          c->x_zero, c->gate_zero, 0, c->multiplier, c->bias, c->out_shift, 0, 255, c->out_zero};
  return run_elementwise(e, k, c->threads, [](RangeJob& job, int64_t first, int64_t last) {
    job.kernel->scale(layer_of<Int8Elementwise>(job), first, last);
  });
}

EXPORT int64_t lego_int8_table(const Int8TableCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!has_valid_maps(*c) || !are_bytes({c->out_zero})) return kBadCall;
  const Int8Elementwise e{c->x + kMapSlack, nullptr, c->table, c->y + kMapSlack,
                          locate_pixels(c->channels, c->height, c->width, c->border), c->batch, c->channels,
                          0, 0, 0, 0, 0, 0, 0, 255, c->out_zero};
  return run_elementwise(e, k, c->threads, [](RangeJob& job, int64_t first, int64_t last) {
    job.kernel->look_up(layer_of<Int8Elementwise>(job), first, last);
  });
}

EXPORT int64_t lego_int8_copy(const Int8CopyCall* c) {
  using namespace lego;
  if (!has_valid_maps(*c) || !are_valid_maps(c->batch, c->out_channels, c->height, c->width, c->border) ||
      c->first_channel < 0 || c->first_channel > c->out_channels - c->channels || !are_bytes({c->out_zero})) {
    return kBadCall;
  }
  RangeJob job;
  job.call = c;
  job.work = [](RangeJob& j, int64_t first, int64_t last) {
    const Int8CopyCall& call = *static_cast<const Int8CopyCall*>(j.call);
    const Int8Geometry in = locate_pixels(call.channels, call.height, call.width, call.border);
    const Int8Geometry out = locate_pixels(call.out_channels, call.height, call.width, call.border);
    const int64_t first_quad = call.first_channel / 4, end = call.first_channel + call.channels;
    const int64_t quads = (end + 3) / 4 - first_quad;
    for (int64_t n = first; n < last; n++) {
      const int64_t image = n / quads, quad = first_quad + n % quads;
      const uint8_t* x = call.x + kMapSlack + image * in.image_bytes;
      uint8_t* y = call.y + kMapSlack + image * out.image_bytes + 4 * quad * out.plane;
      // Whole quads, whose border is the input's; then the border is that of the output.
      const bool whole = call.first_channel % 4 == 0;
      if (whole && 4 * quad + 4 <= end) {
        std::memcpy(y, x + 4 * (quad - first_quad) * in.plane, static_cast<size_t>(4 * in.plane));
      } else {
        for (int64_t u = 0; u < 4; u++) {
          const int64_t channel = 4 * quad + u - call.first_channel;
          if (channel < 0 || channel >= call.channels) continue;
          const uint8_t* from = x + channel / 4 * 4 * in.plane + channel % 4;
          for (int64_t i = 0; i < in.plane; i++) y[4 * i + u] = from[4 * i];
        }
      }
      const int64_t b = out.border, end_of_last = out.first + (out.height - 1) * out.pitch + out.width;
      if (b) {
        const int value = static_cast<int>(call.out_zero);
        std::memset(y, value, static_cast<size_t>(4 * out.first));
        for (int64_t row = 0; row < out.height - 1; row++) {
          std::memset(y + 4 * (out.first + row * out.pitch + out.width), value, static_cast<size_t>(4 * b));
        }
        std::memset(y + 4 * end_of_last, value, static_cast<size_t>(4 * (out.plane - end_of_last)));
      }
    }
  };
  const int64_t quads = (c->first_channel + c->channels + 3) / 4 - c->first_channel / 4;
  return run_planes(job, c->batch * quads, c->threads);
}

EXPORT int64_t lego_int8_max_pool(const Int8PoolCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!has_valid_maps(*c) || !are_valid_maps(c->batch, c->channels, c->out_h, c->out_w, c->out_border) ||
      !are_bytes({c->out_zero}) ||
      !are_valid_sizes({c->kernel_h, c->kernel_w, c->stride_h, c->stride_w, c->dilation_h, c->dilation_w}) ||
      c->pad_h < 0 || c->pad_w < 0 || 2 * c->pad_h > c->kernel_h || 2 * c->pad_w > c->kernel_w ||
      c->out_h != output_size(c->height, c->pad_h, c->dilation_h, c->kernel_h, c->stride_h) ||
      c->out_w != output_size(c->width, c->pad_w, c->dilation_w, c->kernel_w, c->stride_w)) {
    return kBadCall;
  }
  const Int8Pool p{c->x + kMapSlack, c->y + kMapSlack, c->batch, c->kernel_h, c->kernel_w, c->stride_h, c->stride_w,
                   c->pad_h, c->pad_w, c->dilation_h, c->dilation_w,
                   locate_pixels(c->channels, c->height, c->width, c->border),
                   locate_pixels(c->channels, c->out_h, c->out_w, c->out_border), c->out_zero};
  RangeJob job;
  job.layer = &p;
  job.kernel = k;
  job.work = [](RangeJob& j, int64_t first, int64_t last) {
    const Int8Pool& pool = layer_of<Int8Pool>(j);
    const int64_t pixels = 2 * pool.pad_w + pool.in.width + (pool.out.width + 32) * pool.stride_w +
                           (pool.kernel_w - 1) * pool.dilation_w + 64;
    uint8_t* scratch = scratch_bytes(4 * pixels);
    if (scratch) {
      j.kernel->max_pool(pool, first, last, scratch);
    } else {
      j.failed = true;
    }
  };
  return run_planes(job, p.batch * p.in.quads, c->threads);
}

EXPORT int64_t lego_int8_mean(const Int8MeanCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!has_valid_maps(*c) || !are_bytes({c->x_zero, c->zero}) || c->multiplier < -INT32_MAX ||
      c->multiplier > INT32_MAX || c->height * c->width > INT64_MAX / 256 / INT32_MAX) {
    return kBadCall;
  }
  RangeJob job;
  job.call = c;
  job.kernel = k;
  job.work = [](RangeJob& j, int64_t first, int64_t last) {
    const Int8MeanCall& call = *static_cast<const Int8MeanCall*>(j.call);
    const Int8Geometry in = locate_pixels(call.channels, call.height, call.width, call.border);
    const Int8Geometry out = locate_pixels(call.channels, 1, 1, 0);
    for (int64_t plane = first; plane < last; plane++) {
      int64_t sums[4];
      j.kernel->sum_planes(call.x + kMapSlack, in, plane, plane + 1, sums);
      uint8_t* y = call.y + kMapSlack + 4 * plane * out.plane;
      for (int u = 0; u < 4; u++) {
        const int64_t sum = sums[u] - call.x_zero * call.height * call.width;
        const int64_t steps = (sum * call.multiplier + (int64_t{1} << 23)) >> 24;
        y[u] = static_cast<uint8_t>(std::max<int64_t>(0, std::min<int64_t>(255, steps + call.zero)));
      }
    }
  };
  return run_planes(job, c->batch * ((c->channels + 3) / 4), c->threads);
}

EXPORT int64_t lego_int8_quantize(const Int8QuantizeCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!has_valid_maps(*c) || !are_bytes({c->zero})) return kBadCall;
  RangeJob job;
  job.call = c;
  job.kernel = k;
  job.work = [](RangeJob& j, int64_t first, int64_t last) {
    const Int8QuantizeCall& call = *static_cast<const Int8QuantizeCall*>(j.call);
    j.kernel->quantize(call.x, call.y + kMapSlack,
                       locate_pixels(call.channels, call.height, call.width, call.border), call.channels,
                       1.0f / to_float(call.scale), call.zero, first, last);
  };
  return run_planes(job, c->batch * ((c->channels + 3) / 4), c->threads);
}

EXPORT int64_t lego_int8_dequantize(const Int8DequantizeCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!has_valid_maps(*c) || !are_bytes({c->zero})) return kBadCall;
  RangeJob job;
  job.call = c;
  job.kernel = k;
  job.work = [](RangeJob& j, int64_t first, int64_t last) {
    const Int8DequantizeCall& call = *static_cast<const Int8DequantizeCall*>(j.call);
    j.kernel->dequantize(call.x + kMapSlack, call.y,
                         locate_pixels(call.channels, call.height, call.width, call.border), call.channels,
                         to_float(call.scale), call.zero, first, last);
  };
  return run_planes(job, c->batch * ((c->channels + 3) / 4), c->threads);
}

EXPORT int64_t lego_int8_linear(const Int8LinearCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  if (!are_valid_maps(c->batch, c->channels, 1, 1, 0) || !are_valid_sizes({c->n_out, c->threads}) ||
      c->channels > 1 << 16) {
    return kBadCall;
  }
  const Int8Linear l{c->weight, c->offsets, c->scales, c->bias, c->x + kMapSlack, c->y, c->batch, c->channels,
                     c->n_out, locate_pixels(c->channels, 1, 1, 0)};
  RangeJob job;
  job.layer = &l;
  job.kernel = k;
  job.work = [](RangeJob& j, int64_t first, int64_t last) {
    const Int8Linear& linear = layer_of<Int8Linear>(j);
    const int64_t quads = linear.batch * linear.in.quads;
    uint8_t* dense = scratch_bytes(4 * quads);
    if (!dense) {
      j.failed = true;
      return;
    }
    for (int64_t i = 0; i < quads; i++) std::memcpy(dense + 4 * i, linear.x + 4 * i * linear.in.plane, 4);
    j.kernel->linear(linear, dense, first, last);
  };
  return run_planes(job, (l.n_out + 15) / 16, c->threads);
}
