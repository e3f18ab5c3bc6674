// One quantised conv, Lego or dense: checks its packed integers and its call, and distributes its tiles.
#include <cstring>

#include "int8_job.h"

namespace lego {
namespace {

thread_local Buffer t_int8_z;
thread_local Buffer t_shared_int8_z;  // of tiles whose parts several threads compute

// Limits of a tile, chosen by timing: bytes of its Z, pixels, and filters of a dense conv whose Z is kept.
constexpr int64_t kZBytes = 160 * 1024;
constexpr int64_t kMaxPixels = 512;
constexpr int64_t kDenseRows = 96;  // a multiple of 4, kPanelRows and kTileRows

bool is_inside(const Int8Header& h, int64_t at, int64_t count, int64_t size) {
  return at >= static_cast<int64_t>(sizeof(Int8Header)) && at % 4 == 0 && count >= 0 && at <= h.bytes &&
         count <= (h.bytes - at) / size;
}

bool is_layout(const Int8Header& h, Int8Layout layout) { return h.layout == static_cast<int64_t>(layout); }

int64_t panel_rows(const Int8Header& h) {
  return is_layout(h, Int8Layout::kTiles) || is_layout(h, Int8Layout::kColumns) ? kTileRows : kPanelRows;
}

// Bytes of the filters of a part; -1 if its layout does not allow its sizes.
int64_t count_filter_bytes(const Int8Header& h, const Int8Part& p) {
  const int64_t taps = h.kernel_h * h.kernel_w;
  const int64_t panels = (p.rows + kTileRows - 1) / kTileRows;
  switch (static_cast<Int8Layout>(h.layout)) {
    case Int8Layout::kQuads: return multiply_saturating(p.rows, taps * p.quads * 4);
    case Int8Layout::kPairs: return multiply_saturating(p.rows, taps * p.quads * 8);
    case Int8Layout::kTiles: {
      const int64_t blocks = (p.quads + kTileQuads - 1) / kTileQuads;
      if (p.quads % blocks) return -1;
      return multiply_saturating(panels * kTileRows, taps * p.quads * 4);
    }
    case Int8Layout::kColumns: {
      const int64_t blocks = (taps * p.quads + kTileQuads - 1) / kTileQuads;
      return multiply_saturating(panels * kTileRows, blocks * kTileQuads * 4);
    }
    default: return multiply_saturating(p.quads, (taps + 3) / 4 * 16);
  }
}

bool is_valid_header(const char* packed, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(Int8Header)) || reinterpret_cast<uintptr_t>(packed) % 8) return false;
  const Int8Header& h = *reinterpret_cast<const Int8Header*>(packed);
  if (h.magic != kInt8Magic || h.version != kInt8Version || h.bytes != bytes || h.layout < 0 || h.layout > 4 ||
      !are_valid_sizes({h.n_out, h.channels, h.kernel_h, h.kernel_w, h.stride_h, h.stride_w, h.dilation_h,
                        h.dilation_w, h.n_parts, h.n_sum, h.n_rows}) ||
      h.kernel_h * h.kernel_w > kMaxInt8Taps || !are_bytes({h.x_zero, h.low, h.high, h.residual_zero}) ||
      h.out_shift < 0 || h.out_shift > 15 || !are_16_bit({h.residual_multiplier})) {
    return false;
  }
  for (int64_t pad : {h.pad_left, h.pad_right, h.pad_top, h.pad_bottom}) {
    if (pad < 0 || pad > 1 << 20) return false;
  }
  const int64_t quads = (h.n_out + 3) / 4, sums = multiply_saturating(quads * 4, h.n_sum);
  const bool depthwise = is_layout(h, Int8Layout::kDepthwise);
  return is_inside(h, h.parts_at, h.n_parts, sizeof(Int8Part)) && h.parts_at % 8 == 0 &&
         is_inside(h, h.filters_at, h.filters_bytes, 1) &&
         is_inside(h, h.offsets_at, depthwise ? quads * 4 : h.n_rows, 4) &&
         is_inside(h, h.shifts_at, depthwise ? quads * 4 : h.n_rows, 4) && is_inside(h, h.rows_at, sums, 4) &&
         is_inside(h, h.multipliers_at, sums, 4) && is_inside(h, h.bias_at, quads * 4, 4) &&
         (!h.has_table || is_inside(h, h.table_at, 256, 1)) &&
         (!depthwise || (h.n_parts == 1 && h.n_sum == 1 && h.n_out == h.channels && h.n_rows == h.n_out));
}

// Checks a packed buffer, and sets the pointers of `v` that point into it.
Status read_conv(const char* packed, int64_t bytes, Int8Conv& v) {
  if (!is_valid_header(packed, bytes)) return kBadHeader;
  const Int8Header& h = *reinterpret_cast<const Int8Header*>(packed);
  v.header = &h;
  v.parts = reinterpret_cast<const Int8Part*>(packed + h.parts_at);
  v.filters = reinterpret_cast<const int8_t*>(packed + h.filters_at);
  v.offsets = reinterpret_cast<const int32_t*>(packed + h.offsets_at);
  v.shifts = reinterpret_cast<const int32_t*>(packed + h.shifts_at);
  v.rows = reinterpret_cast<const int32_t*>(packed + h.rows_at);
  v.multipliers = reinterpret_cast<const int32_t*>(packed + h.multipliers_at);
  v.bias = reinterpret_cast<const int32_t*>(packed + h.bias_at);
  v.table = h.has_table ? reinterpret_cast<const uint8_t*>(packed + h.table_at) : nullptr;
  const int64_t in_quads = (h.channels + 3) / 4;
  int64_t rows = 0;
  for (int64_t i = 0; i < h.n_parts; i++) {
    const Int8Part& p = v.parts[i];
    if (p.first_quad < 0 || p.quads < 1 || p.first_quad > in_quads || p.quads > in_quads - p.first_quad ||
        p.rows < 0 || p.rows > INT32_MAX || p.filters_at < 0 || p.filters_at > h.filters_bytes) {
      return kBadHeader;
    }
    const int64_t n = count_filter_bytes(h, p);
    if (n < 0 || n > h.filters_bytes - p.filters_at) return kBadHeader;
    if (is_layout(h, Int8Layout::kTiles) && p.quads != v.parts[0].quads) return kBadHeader;
    rows += p.rows;
  }
  if (rows != h.n_rows) return kBadHeader;
  uint32_t largest = 0;
  for (int64_t i = 0; i < (h.n_out + 3) / 4 * 4 * h.n_sum; i++) {
    largest = std::max(largest, static_cast<uint32_t>(v.rows[i]));
  }
  if (static_cast<int64_t>(largest) >= h.n_rows) return kBadRows;
  if (h.is_dense && h.n_parts == 1) {  // blocks of channels are computed without the others' rows
    if (h.n_rows != h.n_out || h.n_sum != 1) return kBadHeader;
    for (int64_t i = 0; i < h.n_out && !is_layout(h, Int8Layout::kDepthwise); i++) {
      if (v.rows[i] != i) return kBadRows;
    }
    for (int64_t i = h.n_out; i < (h.n_out + 3) / 4 * 4; i++) {
      if (v.rows[i] / 4 != (h.n_out - 1) / 4 && !is_layout(h, Int8Layout::kDepthwise)) return kBadRows;
    }
  }
  uint32_t shift = 0;
  for (int64_t i = 0; i < h.n_rows; i++) shift = std::max(shift, static_cast<uint32_t>(v.shifts[i]));
  return shift > 31 ? kBadHeader : kDone;
}

// Whether the numbers of a call fit each other and the conv.
bool fits_conv(const Int8ConvCall& c, const Int8Header& h) {
  if (!are_valid_maps(c.batch, h.channels, c.height, c.width, c.border) ||
      !are_valid_maps(c.batch, h.n_out, c.out_h, c.out_w, c.out_border) || !are_valid_sizes({c.threads}) ||
      !are_bytes({c.out_zero})) {
    return false;
  }
  const int64_t room_h = c.height + h.pad_top + h.pad_bottom - h.dilation_h * (h.kernel_h - 1) - 1;
  const int64_t room_w = c.width + h.pad_left + h.pad_right - h.dilation_w * (h.kernel_w - 1) - 1;
  return room_h >= 0 && room_w >= 0 && c.out_h == room_h / h.stride_h + 1 && c.out_w == room_w / h.stride_w + 1;
}

bool is_fused(const Int8Header& h) {
  return h.is_dense && h.n_parts == 1 && !is_layout(h, Int8Layout::kDepthwise);
}

// Chooses how the input is read and the output is written, and the tiles.
void plan(Int8Conv& v, const Int8Kernel& k, int threads) {
  const Int8Header& h = *v.header;
  const int64_t b = v.in.border;
  v.flat_read = !is_layout(h, Int8Layout::kColumns) && h.stride_h == 1 && h.stride_w == 1 && h.pad_left <= b &&
                h.pad_right <= b && h.pad_top <= b && h.pad_bottom <= b && v.out.width <= v.in.pitch;
  v.pitch = v.out.pitch;
  if (v.flat_read) {
    v.pitch = v.in.pitch;
  } else if (!is_layout(h, Int8Layout::kColumns)) {
    // So that the taps of a pixel at the end of a row do not reach into the next row.
    v.pitch = std::max(v.pitch, v.out.width + (h.kernel_w - 1) * h.dilation_w / h.stride_w);
  }
  v.flat_store = v.pitch == v.out.pitch;
  // Tiles of a map begin at a cache line.
  v.first = v.flat_store ? -(v.out.first % 16) : 0;
  v.last = (v.out.height - 1) * v.pitch + v.out.width;
  v.z_rows = is_fused(h) ? std::min(h.n_rows, kDenseRows) : h.n_rows;
  const int64_t total = v.last - v.first;
  int64_t pixels = std::min(kMaxPixels, kZBytes / (2 * v.z_rows)) / k.pixels * k.pixels;
  pixels = std::max(pixels, k.pixels);
  int64_t n = (total + pixels - 1) / pixels;
  // As many tiles per thread for all threads, if there are at least two each.
  if (threads > 1 && n * v.batch >= 2 * threads && v.batch == 1) n = (n + threads - 1) / threads * threads;
  pixels = (total + n - 1) / n;
  const int64_t step = std::max<int64_t>(16, k.pixels / 2);
  v.tile_pixels = std::max((pixels + step - 1) / step * step, k.pixels);
  v.tiles_per_image = (total + v.tile_pixels - 1) / v.tile_pixels;
  v.n_tiles = v.tiles_per_image * v.batch;
  v.z_stride = ((v.tile_pixels + 63) / 64 * 2 | 1) * 32 + 0;
  v.scratch_bytes = k.count_scratch_bytes(v, v.input_bytes);
}

struct Int8Job {
  const Int8Conv* conv;
  const Int8Kernel* kernel;
  WorkQueue items;
  std::atomic<bool> failed{false};
  int64_t first_tile, n_tiles, parts;  // of the tiles that threads share
  int64_t z_bytes;                     // of one tile
  uint8_t* z;                          // of these tiles
};

Int8Tile find_tile(const Int8Conv& v, int64_t number) {
  const int64_t first = v.first + number % v.tiles_per_image * v.tile_pixels;
  return {number / v.tiles_per_image, first, std::min(v.tile_pixels, v.last - first)};
}

// Computes a dense conv block by block of filters, whose rows of Z stay in the first cache.
void run_fused_tile(const Int8Conv& v, const Int8Kernel& k, const Int8Tile& tile, int64_t first_row, int64_t last_row,
                    int16_t* z, uint8_t* scratch) {
  const int64_t height = panel_rows(*v.header);
  bool pack = true;
  for (int64_t row = first_row; row < last_row; row += kDenseRows, pack = false) {
    const int64_t end = std::min(row + kDenseRows, last_row);
    k.transform(v, tile, 0, row / height, (end + height - 1) / height, pack, z, scratch);
    k.merge(v, tile, row / 4, (end + 3) / 4, z, row, scratch);
  }
}

void run_int8_tiles(void* context) {
  Int8Job& job = *static_cast<Int8Job*>(context);
  const Int8Conv& v = *job.conv;
  const Int8Header& h = *v.header;
  uint8_t* scratch = scratch_bytes(v.scratch_bytes);
  int16_t* z = reinterpret_cast<int16_t*>(t_int8_z.floats(job.z_bytes / 4));
  if (!scratch || !z) {
    job.failed = true;
    return;
  }
  job.kernel->begin(v);
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const Int8Tile tile = find_tile(v, item);
    if (is_layout(h, Int8Layout::kDepthwise)) {
      job.kernel->depthwise(v, tile, 0, v.out.quads, scratch);
    } else if (is_fused(h)) {
      run_fused_tile(v, *job.kernel, tile, 0, h.n_rows, z, scratch);
    } else {
      int64_t row = 0;
      for (int64_t part = 0; part < h.n_parts; row += v.parts[part++].rows) {
        const int64_t panels = (v.parts[part].rows + panel_rows(h) - 1) / panel_rows(h);
        job.kernel->transform(v, tile, part, 0, panels, true, z + row * v.z_stride, scratch);
      }
      job.kernel->merge(v, tile, 0, v.out.quads, z, 0, scratch);
    }
  }
  job.kernel->end(v);
}

// Runs blocks of output channels of tiles whose channels do not share rows of Z.
void run_int8_blocks(void* context) {
  Int8Job& job = *static_cast<Int8Job*>(context);
  const Int8Conv& v = *job.conv;
  uint8_t* scratch = scratch_bytes(v.scratch_bytes);
  int16_t* z = reinterpret_cast<int16_t*>(t_int8_z.floats(job.z_bytes / 4));
  if (!scratch || !z) {
    job.failed = true;
    return;
  }
  job.kernel->begin(v);
  // Blocks are multiples of 48 filters, whole panels of every layout.
  const bool fused = is_fused(*v.header);
  const int64_t total = fused ? v.header->n_rows : v.out.quads, size = fused ? 48 : 1;
  const int64_t blocks = (total + size - 1) / size;
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const Int8Tile tile = find_tile(v, job.first_tile + item % job.n_tiles);
    const int64_t part = item / job.n_tiles;
    const int64_t first = size * (blocks * part / job.parts);
    const int64_t last = std::min(total, size * (blocks * (part + 1) / job.parts));
    if (first >= last) continue;
    if (fused) {
      run_fused_tile(v, *job.kernel, tile, first, last, z, scratch);
    } else {
      job.kernel->depthwise(v, tile, first, last, scratch);
    }
  }
  job.kernel->end(v);
}

void transform_int8_parts(void* context) {
  Int8Job& job = *static_cast<Int8Job*>(context);
  const Int8Conv& v = *job.conv;
  uint8_t* scratch = scratch_bytes(v.scratch_bytes);
  if (!scratch) {
    job.failed = true;
    return;
  }
  job.kernel->begin(v);
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t tile = item % job.n_tiles, piece = item / job.n_tiles % job.parts;
    const int64_t part = item / job.n_tiles / job.parts;
    // Pairs of panels stay together.
    const int64_t height = 2 * panel_rows(*v.header), rows = v.parts[part].rows, pairs = (rows + height - 1) / height;
    const int64_t first = 2 * (pairs * piece / job.parts);
    const int64_t last = std::min(2 * (pairs * (piece + 1) / job.parts), (2 * rows + height - 1) / height);
    if (first >= last) continue;
    int64_t row = first * panel_rows(*v.header);
    for (int64_t i = 0; i < part; i++) row += v.parts[i].rows;
    int16_t* z = reinterpret_cast<int16_t*>(job.z + tile * job.z_bytes) + row * v.z_stride;
    job.kernel->transform(v, find_tile(v, job.first_tile + tile), part, first, last, true, z, scratch);
  }
  job.kernel->end(v);
}

void merge_int8_parts(void* context) {
  Int8Job& job = *static_cast<Int8Job*>(context);
  const Int8Conv& v = *job.conv;
  uint8_t* scratch = scratch_bytes(v.scratch_bytes);
  if (!scratch) {
    job.failed = true;
    return;
  }
  for (int64_t item; (item = job.items.take()) >= 0;) {
    const int64_t tile = item % job.n_tiles, part = item / job.n_tiles;
    const int64_t first = v.out.quads * part / job.parts, last = v.out.quads * (part + 1) / job.parts;
    const int16_t* z = reinterpret_cast<const int16_t*>(job.z + tile * job.z_bytes);
    if (first < last) job.kernel->merge(v, find_tile(v, job.first_tile + tile), first, last, z, 0, scratch);
  }
}

// Runs whole tiles as long as every thread gets the same number of them, then parts of the other tiles.
Status run_int8_conv(const Int8Conv& v, const Int8Kernel& k, int threads) {
  Int8Job job;
  job.conv = &v;
  job.kernel = &k;
  job.z_bytes = (v.z_rows * v.z_stride * 2 + 4096 + 63) / 64 * 64;
  job.first_tile = threads == 1 ? v.n_tiles : v.n_tiles / threads * threads;
  if (job.first_tile) {
    job.items.start(job.first_tile, threads);
    run_on_threads(threads, run_int8_tiles, &job);
  }
  job.n_tiles = v.n_tiles - job.first_tile;
  if (!job.n_tiles || job.failed) return job.failed ? kNoMemory : kDone;
  if (is_layout(*v.header, Int8Layout::kDepthwise) || is_fused(*v.header)) {
    job.parts = (2 * threads + job.n_tiles - 1) / job.n_tiles;
    job.items.start(job.n_tiles * job.parts, threads);
    run_on_threads(threads, run_int8_blocks, &job);
    return job.failed ? kNoMemory : kDone;
  }
  job.z = reinterpret_cast<uint8_t*>(t_shared_int8_z.floats(job.z_bytes / 4 * job.n_tiles));
  if (!job.z) return kNoMemory;
  const int64_t splits = job.n_tiles * v.header->n_parts;
  job.parts = v.flat_read ? std::max<int64_t>(1, (4 * threads + splits - 1) / splits)
                          : std::max<int64_t>(1, (threads + splits - 1) / splits);
  job.items.start(splits * job.parts, threads);
  run_on_threads(threads, transform_int8_parts, &job);
  if (job.failed) return kNoMemory;
  job.parts = 2 * threads;
  job.items.start(job.n_tiles * job.parts, threads);
  run_on_threads(threads, merge_int8_parts, &job);
  return job.failed ? kNoMemory : kDone;
}

}  // namespace
}  // namespace lego

// A quantised conv, its residual, bounds and table. The caller guarantees the sizes of the maps; everything
// else is checked. Returns a Status.
EXPORT int64_t lego_int8_conv(const Int8ConvCall* c) {
  using namespace lego;
  const Int8Kernel* k = int8_kernel(c->isa);
  if (!k) return kNoKernel;
  Int8Conv v{};
  const Status status = read_conv(c->packed, c->packed_bytes, v);
  if (status != kDone) return status;
  if (!(k->layouts >> v.header->layout & 1)) return kBadHeader;
  if (!fits_conv(*c, *v.header)) return kBadCall;
  v.x = c->x + kMapSlack;
  v.residual = c->residual ? c->residual + kMapSlack : nullptr;
  v.y = c->y + kMapSlack;
  v.batch = c->batch;
  v.in = locate_pixels(v.header->channels, c->height, c->width, c->border);
  v.out = locate_pixels(v.header->n_out, c->out_h, c->out_w, c->out_border);
  v.out_zero = c->out_zero;
  const int threads = static_cast<int>(c->threads);
  plan(v, *k, threads);
  return run_int8_conv(v, *k, threads);
}
