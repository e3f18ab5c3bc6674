// One Lego conv: checks its packed unit and its call, and distributes its tiles to threads.
#include "job.h"

namespace lego {
namespace {

thread_local Buffer t_z;
// Z of the tiles that a caller's threads share. It is separate from t_z, since memory that other threads
// have written is slow to write again.
thread_local Buffer t_shared_z;

// Limits of a tile, chosen by timing on AVX2 and AVX-512: the floats of its Z, its pixels, the products of one
// inner loop, and the Winograd patches that are transformed together.
constexpr int64_t kTileFloats = 48 * 1024;
constexpr int64_t kMaxTilePixels = 400;
constexpr int64_t kMaxDepth = 384;
constexpr int64_t kMaxPatches = 128;

// Whether [at, at + count * size) lies in the buffer after its header, aligned to `size`.
bool is_inside(const Header& h, int64_t at, int64_t count, int64_t size) {
  return at >= static_cast<int64_t>(sizeof(Header)) && at % size == 0 && count >= 0 &&
         at <= h.bytes && count <= (h.bytes - at) / size;
}

// Checks the header of a packed buffer.
Status check_header(const char* packed, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(Header)) || reinterpret_cast<uintptr_t>(packed) % 8) {
    return kBadHeader;
  }
  const Header& h = *reinterpret_cast<const Header*>(packed);
  if (h.magic != kMagic || h.version != kVersion || h.bytes != bytes) return kBadHeader;
  if (!are_valid_sizes(
          {h.n_out, h.channels, h.width, h.kernel_h, h.kernel_w, h.n_split, h.n_sum})) {
    return kBadHeader;
  }
  if (h.kernel_h * h.kernel_w > kMaxTaps || h.n_split > bytes) return kBadHeader;
  if (h.winograd_stride && !winograd_side(h)) return kBadHeader;
  if (h.n_split * h.width < h.channels) return kBadHeader;
  const int64_t sums = multiply_saturating(h.n_out, h.n_sum);
  if (!is_inside(h, h.split_rows_at, h.n_split, 8) || !is_inside(h, h.rows_at, sums, 4) ||
      !is_inside(h, h.coefficients_at, sums, 4)) {
    return kBadHeader;
  }
  return kDone;
}

// Checks that the buffer holds the filters of every split; the header and split_rows are valid.
Status check_filters(const Header& h, const int64_t* split_rows) {
  const int64_t side = winograd_side(h), stride = h.winograd_stride;
  // Values per filter and channel: Winograd's frequencies and phases, or the kernel's taps.
  const int64_t values = side ? side * side * stride * stride : h.kernel_h * h.kernel_w;
  int64_t rows = 0, floats = kSlack;
  for (int64_t i = 0; i < h.n_split; i++) {
    const int64_t n = split_rows[i];
    if (n < 0 || n > INT32_MAX) return kBadHeader;
    const int64_t channels = std::max<int64_t>(0, std::min(h.width, h.channels - i * h.width));
    rows += n;
    floats += multiply_saturating(n, channels * values);
    if (rows > INT32_MAX || floats > INT64_MAX / 8) return kBadHeader;
  }
  if (rows != h.n_rows || !is_inside(h, h.filters_at, floats, 4)) return kBadHeader;
  return kDone;
}

// Checks a packed buffer, and sets the pointers of `v` that point into it.
Status read_unit(const char* packed, int64_t bytes, Conv& v) {
  Status status = check_header(packed, bytes);
  if (status != kDone) return status;
  const Header& h = *reinterpret_cast<const Header*>(packed);
  v.header = &h;
  v.split_rows = reinterpret_cast<const int64_t*>(packed + h.split_rows_at);
  status = check_filters(h, v.split_rows);
  if (status != kDone) return status;
  v.filters = reinterpret_cast<const float*>(packed + h.filters_at);
  v.rows = reinterpret_cast<const int32_t*>(packed + h.rows_at);
  v.coefficients = reinterpret_cast<const float*>(packed + h.coefficients_at);
  uint32_t largest = 0;  // negative rows become large numbers
  for (int64_t i = 0; i < h.n_out * h.n_sum; i++) {
    largest = std::max(largest, static_cast<uint32_t>(v.rows[i]));
  }
  return static_cast<int64_t>(largest) < h.n_rows ? kDone : kBadRows;
}

struct Job {
  const Conv* conv;
  const Kernel* kernel;
  WorkQueue items;
  std::atomic<bool> failed{false};
  // Of the tiles that threads share:
  int64_t first_tile, n_tiles;
  int64_t parts;  // parts per split of a tile in the transform, per tile in the merge
  float* z;       // Z of all these tiles
};

// Runs whole tiles. Every thread has its own Z.
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
    for (int64_t split = 0; split < v.header->n_split; split++) {
      job.kernel->transform(v, tile, split, 0, (v.split_rows[split] + kPanel - 1) / kPanel, z,
                            scratch);
    }
    job.kernel->merge(v, tile, 0, v.header->n_out, z, scratch);
  }
}

// Runs parts of the transform, each some panels of one split of one tile, into the shared Z.
void transform_parts(void* context) {
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

// Runs parts of the merge, each some output channels of one tile.
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
    const int64_t blocks = (v.header->n_out + 15) / 16;
    const int64_t first = 16 * (blocks * part / job.parts);
    const int64_t last = std::min(v.header->n_out, 16 * (blocks * (part + 1) / job.parts));
    if (first < last) {
      job.kernel->merge(v, job.first_tile + tile, first, last, job.z + tile * v.z_floats, scratch);
    }
  }
}

// Runs whole tiles as long as every thread gets the same number of them, then parts of the other tiles.
Status run_conv(const Conv& v, const Kernel& k, int threads) {
  Job job;
  job.conv = &v;
  job.kernel = &k;
  job.first_tile = 0;
  const int64_t n_whole = threads == 1 ? v.n_tiles : v.n_even_tiles / threads * threads;
  const int64_t n_shared = v.n_tiles - n_whole;
  if (n_whole) {
    job.items.start(n_whole, threads);
    run_on_threads(threads, run_tiles, &job);
  }
  if (!n_shared || job.failed) return job.failed ? kNoMemory : kDone;
  job.first_tile = n_whole;
  job.n_tiles = n_shared;
  job.z = t_shared_z.floats(v.z_floats * n_shared);
  if (!job.z) return kNoMemory;
  // Each part of a split packs (or transforms) its input again. That is cheap for 1 x 1 kernels, so they
  // are cut into more parts.
  const int64_t kernel_parts = v.header->kernel_h * v.header->kernel_w == 1 ? 4 : 1;
  const int64_t splits = n_shared * v.header->n_split;
  job.parts = std::max<int64_t>(1, (kernel_parts * threads + splits - 1) / splits);
  job.items.start(splits * job.parts, threads);
  run_on_threads(threads, transform_parts, &job);
  if (job.failed) return kNoMemory;
  job.parts = 2 * threads;
  job.items.start(n_shared * job.parts, threads);
  run_on_threads(threads, merge_parts, &job);
  return job.failed ? kNoMemory : kDone;
}

// Whether the call's numbers are in range, and fit each other and the unit.
bool fits_unit(const LegoCall& c, const Header& h) {
  if (!are_valid_sizes({c.batch, c.height, c.width, c.out_h, c.out_w, c.stride_h, c.stride_w,
                        c.dilation_h, c.dilation_w, c.threads})) {
    return false;
  }
  for (int64_t pad : {c.pad_h, c.pad_w}) {
    if (pad < 0 || pad > INT32_MAX) return false;
  }
  if (c.channels != h.channels ||
      c.out_h != output_size(c.height, c.pad_h, c.dilation_h, h.kernel_h, c.stride_h) ||
      c.out_w != output_size(c.width, c.pad_w, c.dilation_w, h.kernel_w, c.stride_w) ||
      c.activation < kNone || c.activation > kSilu) {
    return false;
  }
  return !h.winograd_stride || (c.stride_h == h.winograd_stride && c.stride_w == h.winograd_stride &&
                                c.dilation_h == 1 && c.dilation_w == 1);
}

}  // namespace
}  // namespace lego

// A Lego conv, its residual and its activation. The caller guarantees the sizes of x, bias, residual and
// y; everything else is checked. Returns a Status.
EXPORT int64_t lego_conv2d(const LegoCall* c) {
  using namespace lego;
  const Kernel* k = kernel();
  if (!k) return kNoKernel;
  Conv v{};
  const Status status = read_unit(c->packed, c->packed_bytes, v);
  if (status != kDone) return status;
  if (!fits_unit(*c, *v.header)) return kBadCall;
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
  v.max_tile_pixels = kMaxTilePixels;
  v.max_depth = kMaxDepth;
  v.max_patches = kMaxPatches;
  const int threads = static_cast<int>(c->threads);
  k->plan(v, threads);
  return run_conv(v, *k, threads);
}
