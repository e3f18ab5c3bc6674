// What the driver and the kernels of each instruction set share: the packed unit, and one struct per
// layer that holds its checked arguments.
#pragma once
#include <cstdint>

namespace lego {

enum Activation : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2, kSilu = 3 };

constexpr int64_t kPanel = 6;        // most Lego filters of one panel; the same on every CPU
constexpr int64_t kMagic = 0x4f47454c;
constexpr int64_t kVersion = 2;
constexpr int64_t kMaxTaps = 1024;   // kh * kw
constexpr int64_t kSlack = 16;       // floats past the last filter that may be read, but are not used

// The header of a packed buffer, as pack.py writes it. Offsets are in bytes from the start of the buffer.
struct Header {
  int64_t magic, version, bytes;
  int64_t n_out, channels, width, kernel_h, kernel_w, n_split, n_sum;
  int64_t winograd_stride;  // stride of the conv; 0: packed for the direct form
  int64_t n_rows;
  int64_t split_rows_at;    // int64 (n_split): number of Lego filters that each split uses
  int64_t filters_at;       // float: per split, [frequency,] panel, channel, tap, filter of the panel
  int64_t rows_at;          // int32 (n_out, n_sum): rows of Z to sum
  int64_t coefficients_at;  // float (n_out, n_sum): their coefficients
};

// r + 3, the frequencies per row in Winograd's form F(4 x 4, r x r), with r = kernel / stride rounded up;
// 0 if the unit has no such form.
static inline int64_t winograd_side(const Header& h) {
  const int64_t s = h.winograd_stride, k = h.kernel_h;
  if (s < 1 || s > 2 || k != h.kernel_w || k <= s || k > 4 * s) return 0;
  return (k + s - 1) / s + 3;
}

// One Lego conv: its checked arguments and its tiling.
struct Conv {
  const Header* header;
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

  // The tiling. A tile is a run of output pixels; Z of a tile is n_rows rows of z_stride floats.
  bool whole_rows;          // direct form: tiles of whole output rows, read from zero-padded input rows
  int64_t n_tiles;
  int64_t n_even_tiles;     // the first tiles, which have one size; the others may be smaller
  int64_t tile_pixels;      // output pixels of a tile; in Winograd's form bands
  int64_t tiles_per_image, images_per_tile;
  int64_t image_stride;     // pixels in Z from one image of a tile to the next
  int64_t max_pixels;       // of one run of a tile
  int64_t z_stride;         // floats from one row of Z to the next
  int64_t z_floats, scratch_floats;
  int64_t channel_block;    // channels that are packed at once

  // Limits that the tiling aims at.
  int64_t tile_floats;      // floats of Z
  int64_t max_tile_pixels;
  int64_t max_depth;        // products of one inner loop
  int64_t max_patches;      // 4 x 4 patches
};

// The checked arguments of a max pooling of `planes` maps.
struct Pool {
  const float* x;
  float* y;
  int64_t planes, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t row_floats;  // scratch: a padded row, and the floats that the last vectors read past it
};
constexpr int64_t kMaxPool = 32;  // most rows or columns of the kernel

// The checked arguments of a depthwise conv of NCHW maps.
struct Depthwise {
  const float *weight, *bias, *x;  // (n_out, kernel_h, kernel_w), (n_out) or null
  float* y;
  int64_t batch, channels, n_out;  // n_out is a multiple of channels
  int64_t height, width, out_h, out_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Activation activation;
};

// The checked arguments of a linear layer.
struct Linear {
  const float *weight, *bias, *x;  // (n_out, channels), (n_out) or null, (batch, channels)
  float* y;                        // (batch, n_out)
  int64_t batch, channels, n_out;
  Activation activation;
};

// The functions of one instruction set.
struct Kernel {
  const char* name;
  int lanes, pixels;  // floats of a vector, pixels of a register tile
  // Chooses the tiling of a conv for a number of threads.
  void (*plan)(Conv&, int threads);
  // Computes the rows of Z of one tile that belong to the panels [first, last) of a split.
  void (*transform)(const Conv&, int64_t tile, int64_t split, int64_t first, int64_t last, float* z,
                    float* scratch);
  // Computes output channels [first, last) of one tile: sums rows of Z, adds bias and residual, activates.
  void (*merge)(const Conv&, int64_t tile, int64_t first, int64_t last, const float* z,
                float* scratch);
  // Computes output rows [first_row, last_row) of the planes [first, last).
  void (*max_pool)(const Pool&, int64_t first, int64_t last, int64_t first_row,
                   int64_t last_row, float* row);
  // Computes the means of the planes [first, last).
  void (*means)(const float* x, int64_t size, int64_t first, int64_t last, float* y);
  // Computes outputs [first, last) of every input.
  void (*linear)(const Linear&, int64_t first, int64_t last);
  int64_t (*count_depthwise_floats)(const Depthwise&);  // floats of scratch
  // Computes output planes [first, last), counted over all images.
  void (*depthwise)(const Depthwise&, int64_t first, int64_t last, float* scratch);
};

// Null if this build has no code for the instruction set.
const Kernel* portable_kernel();
const Kernel* neon_kernel();
const Kernel* avx2_kernel();
const Kernel* avx512_kernel();

}  // namespace lego
