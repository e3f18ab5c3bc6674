// The other layers: pooling, means, linear layers and depthwise convs.
#include "job.h"

namespace lego {
namespace {

struct PoolJob {
  const Pool* pool;
  const Kernel* kernel;
  WorkQueue items;  // blocks of planes of the first band of output rows, then of the next
  int64_t bands, blocks;
  std::atomic<bool> failed{false};
};

void run_pool(void* context) {
  PoolJob& job = *static_cast<PoolJob*>(context);
  const Pool& p = *job.pool;
  float* row = thread_scratch().floats(p.row_floats + job.kernel->lanes);
  if (!row) {
    job.failed = true;
    return;
  }
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t band = item / job.blocks, block = item % job.blocks;
    job.kernel->max_pool(p, p.planes * block / job.blocks, p.planes * (block + 1) / job.blocks,
                         p.out_h * band / job.bands, p.out_h * (band + 1) / job.bands, row);
  }
}

struct MeansJob {
  const float* x;
  float* y;
  int64_t planes, size;
  const Kernel* kernel;
  std::atomic<int64_t> next{0};
};

void run_means(void* context) {
  constexpr int64_t kPlanes = 64;
  MeansJob& job = *static_cast<MeansJob*>(context);
  for (int64_t first; (first = kPlanes * job.next++) < job.planes;) {
    job.kernel->means(job.x, job.size, first, std::min(first + kPlanes, job.planes), job.y);
  }
}

constexpr int64_t kOutputs = 16;  // outputs of one item of a linear layer: a cache line

struct LinearJob {
  const Linear* linear;
  const Kernel* kernel;
  WorkQueue items;
};

void run_linear(void* context) {
  LinearJob& job = *static_cast<LinearJob*>(context);
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t first = kOutputs * item;
    job.kernel->linear(*job.linear, first, std::min(first + kOutputs, job.linear->n_out));
  }
}

constexpr int64_t kPlanes = 4;  // planes of one item of a depthwise conv

struct DepthwiseJob {
  const Depthwise* conv;
  const Kernel* kernel;
  WorkQueue items;
  std::atomic<bool> failed{false};
};

void run_depthwise(void* context) {
  DepthwiseJob& job = *static_cast<DepthwiseJob*>(context);
  const Depthwise& d = *job.conv;
  float* scratch = thread_scratch().floats(job.kernel->count_depthwise_floats(d));
  if (!scratch) {
    job.failed = true;
    return;
  }
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t first = kPlanes * item;
    job.kernel->depthwise(d, first, std::min(first + kPlanes, d.batch * d.n_out), scratch);
  }
}

// Whether the numbers of a max pooling are in range and fit each other.
bool is_valid(const PoolCall& c) {
  return are_valid_sizes({c.planes, c.height, c.width, c.out_h, c.out_w, c.kernel_h, c.kernel_w,
                          c.stride_h, c.stride_w, c.dilation_h, c.dilation_w, c.threads}) &&
         c.kernel_h <= kMaxPool && c.kernel_w <= kMaxPool && c.pad_h >= 0 && c.pad_w >= 0 &&
         2 * c.pad_h <= c.kernel_h && 2 * c.pad_w <= c.kernel_w &&
         c.out_h == output_size(c.height, c.pad_h, c.dilation_h, c.kernel_h, c.stride_h) &&
         c.out_w == output_size(c.width, c.pad_w, c.dilation_w, c.kernel_w, c.stride_w);
}

// Whether the numbers of a depthwise conv are in range and fit each other.
bool is_valid(const DepthwiseCall& c) {
  return are_valid_sizes({c.batch, c.channels, c.n_out, c.height, c.width, c.out_h, c.out_w,
                          c.kernel_h, c.kernel_w, c.stride_h, c.stride_w, c.dilation_h,
                          c.dilation_w, c.threads}) &&
         c.pad_h >= 0 && c.pad_w >= 0 && c.pad_h <= INT32_MAX && c.pad_w <= INT32_MAX &&
         c.n_out % c.channels == 0 && multiply_saturating(c.kernel_h, c.kernel_w) <= kMaxTaps &&
         multiply_saturating(c.height + 2 * c.pad_h, c.width + 2 * c.pad_w) <= int64_t{1} << 40 &&
         c.activation >= kNone && c.activation <= kSilu &&
         c.out_h == output_size(c.height, c.pad_h, c.dilation_h, c.kernel_h, c.stride_h) &&
         c.out_w == output_size(c.width, c.pad_w, c.dilation_w, c.kernel_w, c.stride_w);
}

}  // namespace
}  // namespace lego

// Max pooling. The caller guarantees the sizes of x and y. Returns a Status.
EXPORT int64_t lego_max_pool2d(const PoolCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  if (!is_valid(*c)) return kBadCall;
  Pool p{c->x,        c->y,        c->planes, c->height, c->width,      c->out_h,      c->out_w, c->kernel_h,
         c->kernel_w, c->stride_h, c->stride_w, c->pad_h,  c->pad_w,      c->dilation_h, c->dilation_w, 0};
  p.row_floats = c->pad_w + std::max(c->width + c->pad_w,
                                     (c->out_w + k->lanes) * c->stride_w +
                                         (c->kernel_w - 1) * c->dilation_w) +
                 2 * k->lanes;
  PoolJob job;
  job.pool = &p;
  job.kernel = k;
  // One band per thread, since the conv before it has distributed its rows in the same way.
  job.bands = std::min(c->threads, c->out_h);
  job.blocks = (c->planes + 7) / 8;
  const int threads = static_cast<int>(std::min(c->threads, job.bands * job.blocks));
  job.items.start(job.bands * job.blocks, threads);
  run_on_threads(threads, run_pool, &job);
  return job.failed ? kNoMemory : kDone;
}

// The mean of each map. The caller guarantees the sizes of x and y. Returns a Status.
EXPORT int64_t lego_means(const MeansCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  if (!are_valid_sizes({c->planes, c->size, c->threads})) {
    return kBadCall;
  }
  MeansJob job;
  job.x = c->x;
  job.y = c->y;
  job.planes = c->planes;
  job.size = c->size;
  job.kernel = k;
  run_on_threads(static_cast<int>(c->threads), run_means, &job);
  return kDone;
}

// A linear layer. The caller guarantees the sizes of all tensors. Returns a Status.
EXPORT int64_t lego_linear(const LinearCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  if (!are_valid_sizes({c->batch, c->channels, c->n_out, c->threads})) {
    return kBadCall;
  }
  if (c->activation < kNone || c->activation > kSilu) return kBadCall;
  const Linear l{c->weight,   c->bias,  c->x, c->y, c->batch, c->channels, c->n_out,
                 static_cast<Activation>(c->activation)};
  const int64_t items = (l.n_out + kOutputs - 1) / kOutputs;
  const int threads = static_cast<int>(std::min(c->threads, items));
  LinearJob job;
  job.linear = &l;
  job.kernel = k;
  job.items.start(items, threads);
  run_on_threads(threads, run_linear, &job);
  return kDone;
}

// A depthwise conv. The caller guarantees the sizes of all tensors. Returns a Status.
EXPORT int64_t lego_depthwise(const DepthwiseCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  if (!is_valid(*c)) return kBadCall;
  const Depthwise d{c->weight,   c->bias,     c->x,        c->y,        c->batch,      c->channels,
                    c->n_out,    c->height,   c->width,    c->out_h,    c->out_w,      c->kernel_h,
                    c->kernel_w, c->stride_h, c->stride_w, c->pad_h,    c->pad_w,      c->dilation_h,
                    c->dilation_w, static_cast<Activation>(c->activation)};
  const int64_t items = (d.batch * d.n_out + kPlanes - 1) / kPlanes;
  const int threads = static_cast<int>(std::min(c->threads, items));
  DepthwiseJob job;
  job.conv = &d;
  job.kernel = k;
  job.items.start(items, threads);
  run_on_threads(threads, run_depthwise, &job);
  return job.failed ? kNoMemory : kDone;
}
