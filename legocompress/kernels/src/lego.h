// What the driver and the kernels of each instruction set share: a packed unit, and one convolution.
#pragma once
#include <cstdint>

namespace lego {

enum Activation : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2, kSilu = 3 };

constexpr int64_t kPanel = 6;        // Lego filters of one panel, at most; the same on every CPU
constexpr int64_t kMagic = 0x4f47454c;
constexpr int64_t kVersion = 2;
constexpr int64_t kMaxTaps = 1024;   // kh * kw
constexpr int64_t kSlack = 16;       // floats that may be read, never used, past the last filter

// The head of a packed buffer. Offsets are in bytes from its start. pack.py writes the same fields.
struct Header {
  int64_t magic, version, bytes;
  int64_t n_out, channels, width, kernel_h, kernel_w, n_split, n_sum;
  int64_t winograd_stride;  // of the convs that it is packed for; 0: packed for the direct form
  int64_t n_rows;
  int64_t split_rows_at;    // int64 (n_split): Lego filters that each split uses
  int64_t filters_at;       // float: per split, [frequency,] panel, channel, tap, filter of the panel
  int64_t rows_at;          // int32 (n_out, n_sum): which row of Z
  int64_t coefficients_at;  // float (n_out, n_sum): times what
};

// Frequencies of a row in Winograd's form of F(4 x 4, r x r), r = kernel / stride; 0 where it has none.
static inline int64_t winograd_side(const Header& h) {
  const int64_t s = h.winograd_stride, k = h.kernel_h;
  if (s < 1 || s > 2 || k != h.kernel_w || k <= s || k > 4 * s) return 0;
  return (k + s - 1) / s + 3;
}

// One convolution, checked, with its tiling.
struct Conv {
  const Header* head;
  const int64_t* split_rows;
  const float* filters;
  const int32_t* rows;
  const float* coefficients;

  const float* x;
  const float* bias;      // (n_out) or null
  const float* residual;  // like y, or null
  float* y;
  int64_t batch, height, width, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool channels_last;
  Activation activation;

  // Tiling. A tile is a run of output pixels; Z of a tile is n_rows rows of z_stride floats.
  bool direct_rows;        // tiles of whole output rows, read from zero-padded input rows
  int64_t n_tiles, tile_pixels, tiles_per_image, images_per_tile, slot;
  int64_t most_pixels;     // of one run of a tile
  int64_t whole_tiles;     // the first so many are of one size; the others may be smaller
  int64_t z_stride, z_floats, scratch_floats;
  int64_t channel_block;

  // What the tiling aims at: most floats of Z, most pixels, most products of one inner loop,
  // most 4 x 4 patches.
  int64_t tile_floats, tile_pixels_most, depth, patches;
};

// One max pooling of `planes` maps, checked.
struct Pool {
  const float* x;
  float* y;
  int64_t planes, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t row_floats;  // scratch: a padded row, and what the last vectors read past it
};
constexpr int64_t kMaxPool = 32;  // kernel height and width

// One depthwise conv of NCHW maps, checked.
struct Depthwise {
  const float *weight, *bias, *x;  // (n_out, kernel_h, kernel_w), (n_out) or null
  float* y;
  int64_t batch, channels, n_out;  // n_out is a multiple of channels
  int64_t height, width, out_h, out_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Activation activation;
};

// One linear layer on `batch` inputs, checked.
struct Linear {
  const float *weight, *bias, *x;  // (n_out, channels), (n_out) or null, (batch, channels)
  float* y;                        // (batch, n_out)
  int64_t batch, channels, n_out;
  Activation activation;
};

struct Kernel {
  const char* name;
  int lanes, pixels;  // of a vector, of a register tile
  // Choose the tiling of a convolution for so many threads.
  void (*plan)(Conv&, int threads);
  // Rows of Z that the panels [first, last) of a split compute on one tile.
  void (*transform)(const Conv&, int64_t tile, int64_t split, int64_t first, int64_t last, float* z,
                    float* scratch);
  // Output channels [first, last) of one tile: sum rows of Z, add bias and residual, activate.
  void (*merge)(const Conv&, int64_t tile, int64_t first, int64_t last, const float* z,
                float* scratch);
  // Output rows [first_row, last_row) of the planes [first, last).
  void (*max_pool)(const Pool&, int64_t first, int64_t last, int64_t first_row,
                   int64_t last_row, float* row);
  void (*means)(const float* x, int64_t size, int64_t first, int64_t last, float* y);
  void (*linear)(const Linear&, int64_t first, int64_t last);
  int64_t (*depthwise_floats)(const Depthwise&);  // of scratch
  // Output planes [first, last) of all images.
  void (*depthwise)(const Depthwise&, int64_t first, int64_t last, float* scratch);
};

// Null where this build has no code for it.
const Kernel* portable_kernel();
const Kernel* neon_kernel();
const Kernel* avx2_kernel();
const Kernel* avx512_kernel();

}  // namespace lego
