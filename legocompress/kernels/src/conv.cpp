// One Lego conv: its packed unit is checked, and its tiles are dealt out to threads.
#include "job.h"

namespace lego {
namespace {

thread_local Buffer t_z;
// Z of the tiles that a caller's threads share: what others have written is slow to write again.
thread_local Buffer t_shared_z;

// Sizes of a tile, found by timing on AVX2 and AVX-512: its Z in floats, its pixels, the depth of one packed
// panel, and the Winograd patches that are transformed together.
constexpr int64_t kTileFloats = 48 * 1024;
constexpr int64_t kTilePixels = 400;
constexpr int64_t kDepth = 384;
constexpr int64_t kPatches = 128;

// Whether [at, at + count * size) lies in the buffer after its head, aligned.
bool inside(const Header& h, int64_t at, int64_t count, int64_t size) {
  return at >= static_cast<int64_t>(sizeof(Header)) && at % size == 0 && count >= 0 &&
         at <= h.bytes && count <= (h.bytes - at) / size;
}

Status read_unit(const char* packed, int64_t bytes, Conv& v) {
  if (bytes < static_cast<int64_t>(sizeof(Header)) || reinterpret_cast<uintptr_t>(packed) % 8) {
    return kBadHeader;
  }
  const Header& h = *reinterpret_cast<const Header*>(packed);
  if (h.magic != kMagic || h.version != kVersion || h.bytes != bytes) return kBadHeader;
  if (!are_sizes({h.n_out, h.channels, h.width, h.kernel_h, h.kernel_w, h.n_split, h.n_sum})) {
    return kBadHeader;
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
  float* scratch = thread_scratch().floats(v.scratch_floats);
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
  float* scratch = thread_scratch().floats(v.scratch_floats);
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
  float* scratch = thread_scratch().floats(v.scratch_floats);
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

}  // namespace
}  // namespace lego

// Returns a Status. The caller vouches for the sizes of x, bias, residual and y; all else is checked.
EXPORT int64_t lego_conv2d(const LegoCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  Conv v{};
  const Status status = read_unit(c->packed, c->packed_bytes, v);
  if (status != kDone) return status;
  const Header& h = *v.head;
  if (!are_sizes({c->batch, c->height, c->width, c->out_h, c->out_w, c->stride_h, c->stride_w,
                  c->dilation_h, c->dilation_w, c->threads})) {
    return kBadCall;
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
