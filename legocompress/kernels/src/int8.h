// What the driver and the kernels of each instruction set share for quantised layers: maps of uint8, the
// packed integers of a conv, and one struct per layer that holds its checked arguments. The arithmetic is
// that of legocompress/lego/integer.py, bit for bit.
//
// A map of one image is a plane per quad (4 channels). A plane holds the 4 channels of each pixel in 4
// bytes, in rows of W + b pixels: b pixels of border, then the W pixels. The next row's border is the right
// border of this row; b rows of border lie above and below. Border pixels hold the map's zero point.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lego {

constexpr int64_t kInt8Magic = 0x3849474c;
constexpr int64_t kInt8Version = 1;
constexpr int64_t kMapSlack = 1024;    // bytes before and after all planes, which vectors may read
constexpr int64_t kMaxBorder = 64;     // pixels
constexpr int64_t kPanelRows = 6;      // filters of a panel in the layouts kQuads and kPairs
constexpr int64_t kTileRows = 16;      // filters of a panel in the layouts of AMX
constexpr int64_t kMaxInt8Taps = 1024; // kh * kw
constexpr int64_t kTileQuads = 16;     // quads of one AMX tile at most

// The order of the filters in a packed buffer, which instruction sets differ in. In every panel:
enum class Int8Layout : int64_t {
  kQuads = 0,      // tap, quad, filter, channel of the quad: int8
  kPairs = 1,      // tap, quad, channels 0 and 2 or 1 and 3, filter, which of the two: int16
  kTiles = 2,      // tap, block of at most 16 quads, filter, channel of the block: int8
  kColumns = 3,    // the same with taps and quads numbered in one row, in blocks of 16
  kDepthwise = 4,  // no panels: quad, four taps, channel, tap: int8
};

// The header of a packed conv, as int8_pack.py writes it. Offsets are in bytes from the start.
struct Int8Header {
  int64_t magic, version, bytes;
  int64_t layout;  // Int8Layout
  int64_t n_out, channels, kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_left, pad_right, pad_top, pad_bottom, dilation_h, dilation_w;
  int64_t n_parts;  // splits of all groups
  int64_t n_sum;    // terms of one output channel
  int64_t n_rows;   // rows of Z
  int64_t is_dense; // output channel j is row j
  int64_t x_zero, low, high, out_shift, residual_multiplier, residual_zero, has_table;
  int64_t parts_at;        // Int8Part (n_parts)
  int64_t filters_at, filters_bytes;
  int64_t offsets_at;      // int32 (n_rows): added to the sums before the shift
  int64_t shifts_at;       // int32 (n_rows)
  int64_t rows_at;         // int32 (quads of the output, n_sum, 4): rows of Z to sum
  int64_t multipliers_at;  // int32 like rows: the multiplier twice, in both halves
  int64_t bias_at;         // int32 (channels of all quads of the output): the bias twice
  int64_t table_at;        // uint8 (256)
};

// The channels and filters of one split.
struct Int8Part {
  int64_t first_quad, quads, rows;
  int64_t filters_at;  // bytes from the first filter
};

// Where the pixels of a map are.
struct Int8Geometry {
  int64_t height, width, border, quads;
  int64_t pitch;        // pixels from one row to the next
  int64_t first;        // pixels from the start of a plane to its first pixel
  int64_t plane;        // pixels of a plane, an odd multiple of 16
  int64_t image_bytes;  // of all planes of an image
};

inline Int8Geometry locate_pixels(int64_t channels, int64_t height, int64_t width, int64_t border) {
  Int8Geometry g{height, width, border, (channels + 3) / 4, width + border, 0, 0, 0};
  g.first = border * g.pitch + border;
  const int64_t pixels = (height + 2 * border) * g.pitch + border;
  g.plane = ((pixels + 15) / 16 | 1) * 16;
  g.image_bytes = g.quads * g.plane * 4;
  return g;
}

// One conv: its checked arguments and its tiling. Pixels of the output are numbered along rows of `pitch`
// pixels, of which the first out_w are real; a tile is a run of these numbers.
struct Int8Conv {
  const Int8Header* header;
  const Int8Part* parts;
  const int8_t* filters;
  const int32_t *offsets, *shifts, *rows, *multipliers, *bias;
  const uint8_t* table;  // or null

  const uint8_t *x, *residual;  // the first plane; residual may be null
  uint8_t* y;
  int64_t batch;
  Int8Geometry in, out;  // the residual is laid out like the output
  int64_t out_zero;

  int64_t pitch, first, last;  // numbers [first, last); the first ones may be negative
  bool flat_read;              // input rows are `pitch` apart, and taps are offsets into the map
  bool flat_store;             // so are output rows
  int64_t tile_pixels, tiles_per_image, n_tiles;
  int64_t z_stride;            // int16 from one row of Z to the next
  int64_t z_rows;              // rows of Z that are kept
  int64_t input_bytes;         // of packed input in the scratch memory; the rest follows it
  int64_t scratch_bytes;
};

// A run of pixel numbers of one image.
struct Int8Tile {
  int64_t image, first, count;
};

// A sum of two maps, or a map times its gate, or a map that is looked up.
struct Int8Elementwise {
  const uint8_t *a, *b, *table;
  uint8_t* y;
  Int8Geometry at;
  int64_t batch, channels, a_zero, b_zero, a_multiplier, b_multiplier, bias, out_shift, low, high, out_zero;
};

struct Int8Pool {
  const uint8_t* x;
  uint8_t* y;
  int64_t batch, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Int8Geometry in, out;
  int64_t out_zero;
};

struct Int8Linear {
  const int8_t* weight;    // (blocks of 16 outputs, quads, 16, 4)
  const int32_t* offsets;  // (n_out): -x_zero times the sum of the weights
  const float *scales, *bias;
  const uint8_t* x;
  float* y;
  int64_t batch, channels, n_out;
  Int8Geometry in;
};

// The functions of one instruction set.
struct Int8Kernel {
  const char* name;
  int64_t pixels;            // tiles hold multiples of so many pixels
  uint64_t layouts;          // bit i: the kernel reads layout i
  void (*begin)(const Int8Conv&);  // called by each thread before its work on a conv, and `end` after it
  void (*end)(const Int8Conv&);
  // Of one thread; `input_bytes` becomes the part of it that holds packed input.
  int64_t (*count_scratch_bytes)(const Int8Conv&, int64_t& input_bytes);
  // Computes the rows of Z of one tile that belong to the panels [first, last) of a part; z is the
  // row of the first of them. `pack`: whether the input must be packed into the scratch memory first.
  void (*transform)(const Int8Conv&, const Int8Tile&, int64_t part, int64_t first, int64_t last, bool pack,
                    int16_t* z, uint8_t* scratch);
  // Computes the quads [first, last) of the output of a tile; z is the row `z_row` of Z.
  void (*merge)(const Int8Conv&, const Int8Tile&, int64_t first, int64_t last, const int16_t* z,
                int64_t z_row, uint8_t* scratch);
  // Computes quads [first, last) of a tile of a depthwise conv.
  void (*depthwise)(const Int8Conv&, const Int8Tile&, int64_t first, int64_t last, uint8_t* scratch);
  // Computes planes [first, last), counted over all images.
  void (*add)(const Int8Elementwise&, int64_t first, int64_t last);
  void (*scale)(const Int8Elementwise&, int64_t first, int64_t last);
  void (*look_up)(const Int8Elementwise&, int64_t first, int64_t last);
  void (*max_pool)(const Int8Pool&, int64_t first, int64_t last, uint8_t* scratch);
  void (*quantize)(const float* x, uint8_t* y, const Int8Geometry&, int64_t channels, float inverse, int64_t zero,
                   int64_t first, int64_t last);
  void (*dequantize)(const uint8_t* x, float* y, const Int8Geometry&, int64_t channels, float scale, int64_t zero,
                     int64_t first, int64_t last);
  // Sums the pixels of planes [first, last): 4 sums each.
  void (*sum_planes)(const uint8_t* x, const Int8Geometry&, int64_t first, int64_t last, int64_t* sums);
  // Computes blocks [first, last) of 16 outputs of every image; `x` is a dense copy of the input.
  void (*linear)(const Int8Linear&, const uint8_t* x, int64_t first, int64_t last);
};

// Null if this build has no code for the instruction set.
const Int8Kernel* int8_portable_kernel();
const Int8Kernel* int8_avx2_kernel();
const Int8Kernel* int8_avx_vnni_kernel();
const Int8Kernel* int8_avx512_kernel();
const Int8Kernel* int8_avx512_vnni_kernel();
const Int8Kernel* int8_amx_kernel();

}  // namespace lego
