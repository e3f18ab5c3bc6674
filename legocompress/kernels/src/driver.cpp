// The library's C interface: choose the kernels for this CPU, check a call, and run its tiles.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "lego.h"
#include "threads.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

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

const Kernel* kernel() {
  static const Kernel* chosen = choose_kernel();
  return chosen;
}

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
thread_local Buffer t_scratch, t_z;
// Z of the tiles that a caller's threads share: what others have written is slow to write again.
thread_local Buffer t_shared_z;

// Sizes of a tile, found by timing on AVX2 and AVX-512: its Z in floats, its pixels, the depth of one packed
// panel, and the Winograd patches that are transformed together.
constexpr int64_t kTileFloats = 48 * 1024;
constexpr int64_t kTilePixels = 400;
constexpr int64_t kDepth = 384;
constexpr int64_t kPatches = 128;

enum Status : int64_t {
  kDone = 0,
  kBadHeader = 1,
  kBadRows = 2,
  kBadCall = 3,
  kNoMemory = 4,
  kNoKernel = 5,
};

// Whether [at, at + count * size) lies in the buffer after its head, aligned.
bool inside(const Header& h, int64_t at, int64_t count, int64_t size) {
  return at >= static_cast<int64_t>(sizeof(Header)) && at % size == 0 && count >= 0 &&
         at <= h.bytes && count <= (h.bytes - at) / size;
}

int64_t multiply(int64_t a, int64_t b) {  // saturating; both at least 0
  return b && a > INT64_MAX / 4 / b ? INT64_MAX / 4 : a * b;
}

Status read_unit(const char* packed, int64_t bytes, Conv& v) {
  if (bytes < static_cast<int64_t>(sizeof(Header)) || reinterpret_cast<uintptr_t>(packed) % 8) {
    return kBadHeader;
  }
  const Header& h = *reinterpret_cast<const Header*>(packed);
  if (h.magic != kMagic || h.version != kVersion || h.bytes != bytes) return kBadHeader;
  for (int64_t size : {h.n_out, h.channels, h.width, h.kernel_h, h.kernel_w, h.n_split, h.n_sum}) {
    if (size < 1 || size > INT32_MAX) return kBadHeader;
  }
  if (h.kernel_h * h.kernel_w > kMaxTaps || h.n_split > bytes) return kBadHeader;
  const int64_t side = winograd_side(h), stride = h.winograd_stride;
  if (stride && !side) return kBadHeader;
  if (h.n_split * h.width < h.channels) return kBadHeader;
  const int64_t sums = multiply(h.n_out, h.n_sum);
  if (!inside(h, h.split_rows_at, h.n_split, 8) || !inside(h, h.rows_at, sums, 4) ||
      !inside(h, h.coefficients_at, sums, 4)) {
    return kBadHeader;
  }
  v.head = &h;
  v.split_rows = reinterpret_cast<const int64_t*>(packed + h.split_rows_at);
  // The filters' sizes below are of Winograd's frequencies and phases, or of the kernel's taps.
  const int64_t taps = side ? side * side * stride * stride : h.kernel_h * h.kernel_w;
  int64_t rows = 0, floats = kSlack;
  for (int64_t i = 0; i < h.n_split; i++) {
    const int64_t n = v.split_rows[i];
    if (n < 0 || n > INT32_MAX) return kBadHeader;
    const int64_t channels =
        std::max<int64_t>(0, std::min(h.width, h.channels - i * h.width));
    rows += n;
    floats += multiply(n, channels * taps);
    if (rows > INT32_MAX || floats > INT64_MAX / 8) return kBadHeader;
  }
  if (rows != h.n_rows || !inside(h, h.filters_at, floats, 4)) return kBadHeader;
  v.filters = reinterpret_cast<const float*>(packed + h.filters_at);
  v.rows = reinterpret_cast<const int32_t*>(packed + h.rows_at);
  v.coefficients = reinterpret_cast<const float*>(packed + h.coefficients_at);
  uint32_t largest = 0;
  for (int64_t i = 0; i < sums; i++) {
    largest = std::max(largest, static_cast<uint32_t>(v.rows[i]));
  }
  return static_cast<int64_t>(largest) < h.n_rows ? kDone : kBadRows;
}

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

struct Job {
  const Conv* conv;
  const Kernel* kernel;
  Deal items;
  std::atomic<bool> failed{false};
  int64_t first_tile, n_tiles;  // that are run in parts
  int64_t parts;  // that a split of a tile is cut into, or output channels of a tile
  float* z;       // of all tiles from the first on, where threads share tiles
};

// Whole tiles: every thread has a Z of its own.
void run_tiles(void* context) {
  Job& job = *static_cast<Job*>(context);
  const Conv& v = *job.conv;
  float* z = t_z.floats(v.z_floats);
  float* scratch = t_scratch.floats(v.scratch_floats);
  if (!z || !scratch) {
    job.failed = true;
    return;
  }
  for (int64_t tile; (tile = job.items.take()) >= 0;) {
    for (int64_t split = 0; split < v.head->n_split; split++) {
      job.kernel->transform(v, tile, split, 0, (v.split_rows[split] + kPanel - 1) / kPanel, z,
                            scratch);
    }
    job.kernel->merge(v, tile, 0, v.head->n_out, z, scratch);
  }
}

// Parts of tiles: some panels of one split of one tile, into the Z that all threads share.
void run_parts(void* context) {
  Job& job = *static_cast<Job*>(context);
  const Conv& v = *job.conv;
  float* scratch = t_scratch.floats(v.scratch_floats);
  if (!scratch) {
    job.failed = true;
    return;
  }
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t tile = item % job.n_tiles, part = item / job.n_tiles % job.parts;
    const int64_t split = item / job.n_tiles / job.parts;
    const int64_t panels = (v.split_rows[split] + kPanel - 1) / kPanel;
    const int64_t first = panels * part / job.parts, last = panels * (part + 1) / job.parts;
    if (first < last) {
      job.kernel->transform(v, job.first_tile + tile, split, first, last,
                            job.z + tile * v.z_floats, scratch);
    }
  }
}

void merge_parts(void* context) {
  Job& job = *static_cast<Job*>(context);
  const Conv& v = *job.conv;
  float* scratch = t_scratch.floats(v.scratch_floats);
  if (!scratch) {
    job.failed = true;
    return;
  }
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t tile = item % job.n_tiles, part = item / job.n_tiles;
    // Multiples of 16 channels, so that blocks of channels stay whole.
    const int64_t blocks = (v.head->n_out + 15) / 16;
    const int64_t first = 16 * (blocks * part / job.parts);
    const int64_t last = std::min(v.head->n_out, 16 * (blocks * (part + 1) / job.parts));
    if (first < last) {
      job.kernel->merge(v, job.first_tile + tile, first, last, job.z + tile * v.z_floats, scratch);
    }
  }
}

Status run(const Conv& v, const Kernel& k, int threads) {
  Job job;
  job.conv = &v;
  job.kernel = &k;
  job.first_tile = 0;
  // Whole tiles as long as every thread has one of the same size, then parts of those that are left.
  const int64_t whole = threads == 1 ? v.n_tiles : v.whole_tiles / threads * threads;
  const int64_t left = v.n_tiles - whole;
  if (whole) {
    job.items.start(whole, threads);
    on_threads(threads, run_tiles, &job);
  }
  if (!left || job.failed) return job.failed ? kNoMemory : kDone;
  job.first_tile = whole;
  job.n_tiles = left;
  job.z = t_shared_z.floats(v.z_floats * left);
  if (!job.z) return kNoMemory;
  // Each part of a split packs (or transforms) its input again; 1 x 1 kernels need little of that.
  const int64_t wanted = (v.head->kernel_h * v.head->kernel_w == 1 ? 4 : 1) * threads;
  const int64_t splits = left * v.head->n_split;
  job.parts = std::max<int64_t>(1, (wanted + splits - 1) / splits);
  job.items.start(splits * job.parts, threads);
  on_threads(threads, run_parts, &job);
  if (job.failed) return kNoMemory;
  job.parts = 2 * threads;
  job.items.start(left * job.parts, threads);
  on_threads(threads, merge_parts, &job);
  return job.failed ? kNoMemory : kDone;
}

struct PoolJob {
  const Pool* pool;
  const Kernel* kernel;
  Deal items;  // blocks of planes of the first bands of output rows, then of the next
  int64_t bands, blocks;
  std::atomic<bool> failed{false};
};

void run_pool(void* context) {
  PoolJob& job = *static_cast<PoolJob*>(context);
  const Pool& p = *job.pool;
  float* row = t_scratch.floats(p.row_floats + job.kernel->lanes);
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

constexpr int64_t kOutputs = 16;  // of a linear layer, dealt out together: a cache line

struct LinearJob {
  const Linear* linear;
  const Kernel* kernel;
  Deal items;
};

void run_linear(void* context) {
  LinearJob& job = *static_cast<LinearJob*>(context);
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t first = kOutputs * item;
    job.kernel->linear(*job.linear, first, std::min(first + kOutputs, job.linear->n_out));
  }
}

constexpr int64_t kPlanes = 4;  // of a depthwise conv, dealt out together

struct DepthwiseJob {
  const Depthwise* conv;
  const Kernel* kernel;
  Deal items;
  std::atomic<bool> failed{false};
};

void run_depthwise(void* context) {
  DepthwiseJob& job = *static_cast<DepthwiseJob*>(context);
  const Depthwise& d = *job.conv;
  float* scratch = t_scratch.floats(job.kernel->depthwise_floats(d));
  if (!scratch) {
    job.failed = true;
    return;
  }
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t first = kPlanes * item;
    job.kernel->depthwise(d, first, std::min(first + kPlanes, d.batch * d.n_out), scratch);
  }
}

int64_t out_size(int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? -1 : room / stride + 1;
}

}  // namespace
}  // namespace lego

// What Python fills in: pointers, constants first and the output last, then numbers, all 8 bytes wide.
struct LegoCall {
  const char* packed;
  const float *bias, *x, *residual;
  float* y;
  int64_t packed_bytes, channels;
  int64_t batch, height, width, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t channels_last, activation, threads;
};

// The name of the kernels that run here, or null: LEGOCOMPRESS_ISA names none that can.
EXPORT const char* lego_isa() {
  const lego::Kernel* k = lego::kernel();
  return k ? k->name : nullptr;
}

// Returns a Status. The caller vouches for the sizes of x, bias, residual and y; all else is checked.
EXPORT int64_t lego_conv2d(const LegoCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  Conv v{};
  const Status status = read_unit(c->packed, c->packed_bytes, v);
  if (status != kDone) return status;
  const Header& h = *v.head;
  for (int64_t size : {c->batch, c->height, c->width, c->out_h, c->out_w, c->stride_h, c->stride_w,
                       c->dilation_h, c->dilation_w, c->threads}) {
    if (size < 1 || size > INT32_MAX) return kBadCall;
  }
  for (int64_t pad : {c->pad_h, c->pad_w}) {
    if (pad < 0 || pad > INT32_MAX) return kBadCall;
  }
  if (c->channels != h.channels ||
      c->out_h != out_size(c->height, c->pad_h, c->dilation_h, h.kernel_h, c->stride_h) ||
      c->out_w != out_size(c->width, c->pad_w, c->dilation_w, h.kernel_w, c->stride_w) ||
      c->activation < kNone || c->activation > kSilu) {
    return kBadCall;
  }
  if (h.winograd_stride && (c->stride_h != h.winograd_stride || c->stride_w != h.winograd_stride ||
                            c->dilation_h != 1 || c->dilation_w != 1)) {
    return kBadCall;
  }
  v.x = c->x;
  v.bias = c->bias;
  v.residual = c->residual;
  v.y = c->y;
  v.batch = c->batch, v.height = c->height, v.width = c->width;
  v.out_h = c->out_h, v.out_w = c->out_w;
  v.stride_h = c->stride_h, v.stride_w = c->stride_w;
  v.pad_h = c->pad_h, v.pad_w = c->pad_w;
  v.dilation_h = c->dilation_h, v.dilation_w = c->dilation_w;
  v.channels_last = c->channels_last != 0;
  v.activation = static_cast<Activation>(c->activation);
  v.tile_floats = kTileFloats;
  v.tile_pixels_most = kTilePixels;
  v.depth = kDepth;
  v.patches = kPatches;
  const int threads = static_cast<int>(c->threads);
  k->plan(v, threads);
  return run(v, *k, threads);
}

struct PoolCall {
  const float* x;
  float* y;
  int64_t planes, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t threads;
};

// Max pooling. The caller vouches for the sizes of x and y; returns a Status.
EXPORT int64_t lego_max_pool2d(const PoolCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  for (int64_t size : {c->planes, c->height, c->width, c->out_h, c->out_w, c->kernel_h, c->kernel_w,
                       c->stride_h, c->stride_w, c->dilation_h, c->dilation_w, c->threads}) {
    if (size < 1 || size > INT32_MAX) return kBadCall;
  }
  if (c->kernel_h > kMaxPool || c->kernel_w > kMaxPool || c->pad_h < 0 || c->pad_w < 0 ||
      2 * c->pad_h > c->kernel_h || 2 * c->pad_w > c->kernel_w ||
      c->out_h != out_size(c->height, c->pad_h, c->dilation_h, c->kernel_h, c->stride_h) ||
      c->out_w != out_size(c->width, c->pad_w, c->dilation_w, c->kernel_w, c->stride_w)) {
    return kBadCall;
  }
  Pool p{c->x,        c->y,        c->planes, c->height, c->width,      c->out_h,      c->out_w, c->kernel_h,
         c->kernel_w, c->stride_h, c->stride_w, c->pad_h,  c->pad_w,      c->dilation_h, c->dilation_w, 0};
  p.row_floats = c->pad_w + std::max(c->width + c->pad_w,
                                     (c->out_w + k->lanes) * c->stride_w +
                                         (c->kernel_w - 1) * c->dilation_w) +
                 2 * k->lanes;
  PoolJob job;
  job.pool = &p;
  job.kernel = k;
  // A band a thread, since the conv before has dealt out its rows in the same way.
  job.bands = std::min(c->threads, c->out_h);
  job.blocks = (c->planes + 7) / 8;
  const int threads = static_cast<int>(std::min(c->threads, job.bands * job.blocks));
  job.items.start(job.bands * job.blocks, threads);
  on_threads(threads, run_pool, &job);
  return job.failed ? kNoMemory : kDone;
}

struct MeansCall {
  const float* x;
  float* y;
  int64_t planes, size, threads;
};

// The mean of each map. The caller vouches for the sizes of x and y; returns a Status.
EXPORT int64_t lego_means(const MeansCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  for (int64_t size : {c->planes, c->size, c->threads}) {
    if (size < 1 || size > INT32_MAX) return kBadCall;
  }
  MeansJob job;
  job.x = c->x;
  job.y = c->y;
  job.planes = c->planes;
  job.size = c->size;
  job.kernel = k;
  on_threads(static_cast<int>(c->threads), run_means, &job);
  return kDone;
}

struct LinearCall {
  const float *weight, *bias, *x;
  float* y;
  int64_t batch, channels, n_out, activation, threads;
};

// A linear layer. The caller vouches for the sizes of all tensors; returns a Status.
EXPORT int64_t lego_linear(const LinearCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  for (int64_t size : {c->batch, c->channels, c->n_out, c->threads}) {
    if (size < 1 || size > INT32_MAX) return kBadCall;
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
  on_threads(threads, run_linear, &job);
  return kDone;
}

struct DepthwiseCall {
  const float *weight, *bias, *x;
  float* y;
  int64_t batch, channels, n_out, height, width, out_h, out_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t activation, threads;
};

// A depthwise conv. The caller vouches for the sizes of all tensors; returns a Status.
EXPORT int64_t lego_depthwise(const DepthwiseCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  for (int64_t size : {c->batch, c->channels, c->n_out, c->height, c->width, c->out_h, c->out_w,
                       c->kernel_h, c->kernel_w, c->stride_h, c->stride_w, c->dilation_h,
                       c->dilation_w, c->threads}) {
    if (size < 1 || size > INT32_MAX) return kBadCall;
  }
  if (c->pad_h < 0 || c->pad_w < 0 || c->pad_h > INT32_MAX || c->pad_w > INT32_MAX ||
      c->n_out % c->channels || multiply(c->kernel_h, c->kernel_w) > kMaxTaps ||
      multiply(c->height + 2 * c->pad_h, c->width + 2 * c->pad_w) > int64_t{1} << 40 ||
      c->activation < kNone || c->activation > kSilu ||
      c->out_h != out_size(c->height, c->pad_h, c->dilation_h, c->kernel_h, c->stride_h) ||
      c->out_w != out_size(c->width, c->pad_w, c->dilation_w, c->kernel_w, c->stride_w)) {
    return kBadCall;
  }
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
  on_threads(threads, run_depthwise, &job);
  return job.failed ? kNoMemory : kDone;
}

struct RunCall {
  const int64_t* code;
  int64_t words;
};

// Other calls one after the other, each the number of its function and its struct; returns the first
// Status that is not kDone.
EXPORT int64_t lego_run(const RunCall* c) {
  using namespace lego;
  constexpr int64_t kWords[] = {sizeof(LegoCall) / 8, sizeof(PoolCall) / 8, sizeof(MeansCall) / 8,
                                sizeof(LinearCall) / 8, sizeof(DepthwiseCall) / 8};
  for (const int64_t *at = c->code, *end = at + c->words; at < end;) {
    const int64_t function = *at++;
    if (function < 0 || function > 4 || kWords[function] > end - at) return kBadCall;
    const int64_t status = function == 0   ? lego_conv2d(reinterpret_cast<const LegoCall*>(at))
                           : function == 1 ? lego_max_pool2d(reinterpret_cast<const PoolCall*>(at))
                           : function == 2 ? lego_means(reinterpret_cast<const MeansCall*>(at))
                           : function == 3 ? lego_linear(reinterpret_cast<const LinearCall*>(at))
                                           : lego_depthwise(reinterpret_cast<const DepthwiseCall*>(at));
    if (status != kDone) return status;
    at += kWords[function];
  }
  return kDone;
}
