// See linear.h. One source for every variant; operators and tests choose one.
//
//   x --(chunks of rows)--> rows of int8 blocks --(ranges of panel pairs)--> y
//
// Both happen in one call of the pool: threads take chunks of rows until none is left, wait for chunks that another
// thread is busy with, then take ranges of panels.
#include "linear.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <utility>

#include "dot.h"

#if defined(__clang__)
#define HEADRACE_UNROLL _Pragma("unroll")
#else
#define HEADRACE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace headrace {
namespace HEADRACE_VARIANT {
namespace {

// Registers: sums and floats of ROWS x COLUMNS vectors, and for a scale a row only sums of LONG_ROWS x COLUMNS.
#if defined(__AVX512VNNI__)
constexpr int ROWS = 6, LONG_ROWS = 12, COLUMNS = 2;
#elif defined(__AVX2__)
constexpr int ROWS = 4, LONG_ROWS = 4, COLUMNS = 1;
#else
constexpr int ROWS = 2, LONG_ROWS = 2, COLUMNS = 1;
#endif

// Quantized rows that are multiplied by all weights before the next: they stay in the second-level cache.
constexpr int64_t TILE_BYTES = 384 << 10;

// Steps of a row with one scale between which memory is fetched ahead.
constexpr int64_t SLICE = 32;

// Slices of the inputs that a kernel takes one after the other.
int64_t num_slices(const WeightShape& shape) {
  return shape.num_blocks() > 1 ? shape.num_blocks() : (shape.padded_block() / 4 + SLICE - 1) / SLICE;
}

// What a kernel needs to know of one pair of panels.
struct Panels {
  const WeightShape* shape;
  const uint8_t* packed;       // of the first panel
  const uint8_t* ahead;        // memory to fetch meanwhile: the next pair
  int64_t ahead_per_slice;     // bytes of it for each slice of the inputs
  int64_t row_bytes;           // of a quantized row
};

struct Rows {
  const int8_t* quantized;
  float* y;
  int64_t y_stride;
  int64_t num_columns;  // that exist, from y's first on
};

HEADRACE_INLINE void store_columns(float* y, Vec value, int64_t count) {
  if (count >= WIDTH) {
    store(y, value);
  } else if (count > 0) {
    std::memcpy(y, &value, (size_t)count * 4);
  }
}

HEADRACE_INLINE void fetch_ahead(const Panels& panels, int64_t slice) {
  const uint8_t* from = panels.ahead + slice * panels.ahead_per_slice;
  for (int64_t i = 0; i < panels.ahead_per_slice; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Adds the products of R rows and C vectors of columns over some steps.
template <int BITS, int R, int C>
HEADRACE_INLINE void add_steps(Sums<BITS> (&sums)[R][C], const uint8_t* weights, int64_t panel_bytes,
                               const int8_t* inputs, int64_t row_bytes, int64_t num_steps) {
  constexpr int AT_ONCE = 8 / BITS;
#if defined(__clang__)
#pragma clang loop unroll_count(2)
#else
#pragma GCC unroll 2
#endif
  for (int64_t step = 0; step < num_steps; step += AT_ONCE) {
    Weights loaded[AT_ONCE][C];
    HEADRACE_UNROLL
    for (int c = 0; c < C; ++c) {
      const uint8_t* from = weights + c * panel_bytes;
      if (BITS == 8) {
        loaded[0][c] = whole_bytes(from);
      } else {
        loaded[0][c] = low_halves(from);
        loaded[AT_ONCE - 1][c] = high_halves(from);
      }
    }
    HEADRACE_UNROLL
    for (int i = 0; i < AT_ONCE; ++i) {
      HEADRACE_UNROLL
      for (int r = 0; r < R; ++r) {
        const int32_t four = load_int(inputs + r * row_bytes + i * 4);
        HEADRACE_UNROLL
        for (int c = 0; c < C; ++c) sums[r][c].add(loaded[i][c], four);
      }
    }
    weights += PANEL * 4;
    inputs += 4 * AT_ONCE;
  }
}

template <int BITS, int R, int C>
HEADRACE_INLINE void add_block(Sums<BITS> (&sums)[R][C], const uint8_t* weights, int64_t panel_bytes,
                               const int8_t* inputs, int64_t row_bytes, int64_t num_steps) {
  for (int64_t step = 0; step < num_steps; step += MAX_STEPS) {
    const int64_t count = num_steps - step < MAX_STEPS ? num_steps - step : MAX_STEPS;
    add_steps<BITS, R, C>(sums, weights + step * PANEL * BITS / 2, panel_bytes, inputs + step * 4, row_bytes, count);
    HEADRACE_UNROLL
    for (int r = 0; r < R; ++r) {
      HEADRACE_UNROLL
      for (int c = 0; c < C; ++c) sums[r][c].widen();
    }
  }
}

// R rows times COLUMNS vectors of columns, with a scale of the rows for each block.
template <int BITS, bool ZEROS, bool SCALES, int R>
void multiply_blocks(const Panels& panels, const Rows& rows, int64_t lane) {
  const WeightShape& shape = *panels.shape;
  const int64_t panel_bytes = shape.panel_bytes(), row_bytes = panels.row_bytes, padded = shape.padded_block();
  const uint8_t* weights = panels.packed + lane * 4;
  const uint8_t* scales = panels.packed + shape.integer_bytes() + lane * 4;
  const uint8_t* zeros = panels.packed + shape.integer_bytes() + shape.scale_bytes() + lane;
  const int8_t* row = rows.quantized;
  Vec totals[R][COLUMNS] = {};
  const int64_t num_blocks = shape.num_blocks();
  for (int64_t block = 0; block < num_blocks; ++block) {
    fetch_ahead(panels, block);
    Sums<BITS> sums[R][COLUMNS];
    HEADRACE_UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
      const VecI zero = ZEROS ? load_bytes(zeros + c * panel_bytes) : VecI{};
      HEADRACE_UNROLL
      for (int r = 0; r < R; ++r) {
        const VecI start = splat_int(load_int(row + r * row_bytes + 4));
        sums[r][c].clear(ZEROS ? start * zero : start);
      }
    }
    add_block<BITS, R, COLUMNS>(sums, weights, panel_bytes, row + sizeof(RowBlock), row_bytes, padded / 4);
    HEADRACE_UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
      const Vec scale = SCALES ? load_as<Vec>(scales + c * panel_bytes) : Vec{};
      HEADRACE_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec row_scale = splat(load_as<float>(row + r * row_bytes));
        totals[r][c] = fma(to_float(sums[r][c].sums), SCALES ? scale * row_scale : row_scale, totals[r][c]);
      }
    }
    weights += padded * PANEL * BITS / 8;
    row += sizeof(RowBlock) + padded;
    if (SCALES) scales += PANEL * 4;
    if (ZEROS) zeros += PANEL;
  }
  HEADRACE_UNROLL
  for (int c = 0; c < COLUMNS; ++c) {
    const int64_t column = lane + c * PANEL;
    HEADRACE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec value = SCALES ? totals[r][c] : totals[r][c] * load_as<Vec>(scales + c * panel_bytes);
      store_columns(rows.y + r * rows.y_stride + column, value, rows.num_columns - column);
    }
  }
}

// R quantized rows times COLUMNS vectors of columns, with one scale for a whole row.
template <int BITS, int R>
void multiply_rows(const Panels& panels, const Rows& rows, int64_t lane) {
  const WeightShape& shape = *panels.shape;
  const int64_t panel_bytes = shape.panel_bytes(), row_bytes = panels.row_bytes;
  const int8_t* row = rows.quantized;
  Sums<BITS> sums[R][COLUMNS];
  HEADRACE_UNROLL
  for (int r = 0; r < R; ++r) {
    HEADRACE_UNROLL
    for (int c = 0; c < COLUMNS; ++c) sums[r][c].clear(splat_int(load_int(row + r * row_bytes + 4)));
  }
  const int64_t num_steps = shape.padded_block() / 4;
  for (int64_t step = 0; step < num_steps; step += SLICE) {
    fetch_ahead(panels, step / SLICE);
    const int64_t count = num_steps - step < SLICE ? num_steps - step : SLICE;
    add_block<BITS, R, COLUMNS>(sums, panels.packed + (step * PANEL + lane) * 4, panel_bytes,
                                row + sizeof(RowBlock) + step * 4, row_bytes, count);
  }
  HEADRACE_UNROLL
  for (int c = 0; c < COLUMNS; ++c) {
    const Vec scale = load_as<Vec>(panels.packed + shape.integer_bytes() + lane * 4 + c * panel_bytes);
    const int64_t column = lane + c * PANEL;
    HEADRACE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec value = to_float(sums[r][c].sums) * splat(load_as<float>(row + r * row_bytes));
      store_columns(rows.y + r * rows.y_stride + column, value * scale, rows.num_columns - column);
    }
  }
}

typedef void (*Kernel)(const Panels&, const Rows&, int64_t lane);

template <int BITS, bool ZEROS, bool SCALES, size_t... I>
const Kernel* block_kernels(std::index_sequence<I...>) {
  static const Kernel kernels[] = {multiply_blocks<BITS, ZEROS, SCALES, I + 1>...};
  return kernels;
}

template <size_t... I>
const Kernel* row_kernels(std::index_sequence<I...>) {
  static const Kernel kernels[] = {multiply_rows<8, I + 1>...};
  return kernels;
}

// Kernels for 1, 2, ... max_rows rows of x.
struct Kernels {
  const Kernel* of;
  int64_t max_rows;
};

Kernels kernels_for(const WeightShape& shape) {
  if (shape.bits == 8 && shape.num_blocks() == 1 && !shape.has_zero_points && !shape.has_block_scales) {
    return {row_kernels(std::make_index_sequence<LONG_ROWS>()), LONG_ROWS};
  }
  const auto counts = std::make_index_sequence<ROWS>();
  const bool zeros = shape.has_zero_points, scales = shape.has_block_scales;
  if (shape.bits == 4) {
    if (zeros) return {block_kernels<4, true, true>(counts), ROWS};
    return {block_kernels<4, false, true>(counts), ROWS};
  }
  if (zeros) return {block_kernels<8, true, true>(counts), ROWS};
  if (scales) return {block_kernels<8, false, true>(counts), ROWS};
  return {block_kernels<8, false, false>(counts), ROWS};
}

// Memory of a thread, kept between calls.
uint8_t* scratch(size_t size) {
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<uint8_t, Free> memory;
  thread_local size_t capacity = 0;
  if (capacity < size) {
    capacity = (size + (size >> 2) + 4095) / 4096 * 4096;
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, capacity)));
  }
  return memory.get();
}

// Floats that a thread quantizes at once, where threads share the work.
constexpr int64_t CHUNK = 16384;

// One call of multiply.
class Product {
 public:
  Product(const WeightShape& shape, const uint8_t* packed, const float* x, int64_t num_rows, float x_scale, float* y,
          int num_threads)
      : shape_(shape),
        packed_(packed),
        x_(x),
        y_(y),
        num_rows_(num_rows),
        x_scale_(x_scale),
        num_threads_(num_threads) {
    row_bytes_ = shape.num_blocks() * (int64_t(sizeof(RowBlock)) + shape.padded_block());
    quantized_ = reinterpret_cast<int8_t*>(scratch(size_t(num_rows * row_bytes_)));
    kernels_ = kernels_for(shape);
    rows_per_chunk_ = CHUNK / shape.num_inputs + 1;
    num_chunks_ = (num_rows + rows_per_chunk_ - 1) / rows_per_chunk_;
    rows_per_tile_ = TILE_BYTES / row_bytes_ / kernels_.max_rows * kernels_.max_rows;
    if (rows_per_tile_ < kernels_.max_rows) rows_per_tile_ = kernels_.max_rows;
    num_pairs_ = shape.num_panels() / 2;
    num_units_ = (num_rows + rows_per_tile_ - 1) / rows_per_tile_ * num_pairs_;
  }

  void run(const Parallel& parallel) {
    if (num_chunks_ == 1) take_chunks();
    const int64_t num_tasks = num_units_ < num_threads_ ? num_units_ : num_threads_;
    parallel.each(size_t(num_tasks), [this](size_t) {
      take_chunks();
      // Whoever has a chunk in hand is at work on it, so this ends.
      while (chunks_done_.load(std::memory_order_acquire) < num_chunks_) pause();
      take_units();
    });
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  void take_chunks() {
    for (int64_t chunk; (chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed)) < num_chunks_;) {
      const int64_t first = chunk * rows_per_chunk_;
      const int64_t last = first + rows_per_chunk_ < num_rows_ ? first + rows_per_chunk_ : num_rows_;
      for (int64_t row = first; row < last; ++row) quantize_row(row);
      chunks_done_.fetch_add(1, std::memory_order_release);
    }
  }

  void quantize_row(int64_t row) {
    const int64_t size = shape_.padded_block(), stride = size + int64_t(sizeof(RowBlock));
    const int32_t zero_point = shape_.has_zero_points ? 1 : 1 << (shape_.bits - 1);
    int8_t* to = quantized_ + row * row_bytes_;
    for (int64_t start = 0; start < shape_.num_inputs; start += shape_.block_size, to += stride) {
      const int64_t left = shape_.num_inputs - start, count = left < shape_.block_size ? left : shape_.block_size;
      const float* from = x_ + row * shape_.num_inputs + start;
      RowBlock* block = reinterpret_cast<RowBlock*>(to);
      if (x_scale_ > 0) {
        quantize_block(from, count, size, zero_point, x_scale_, block);
      } else {
        quantize_block(from, count, size, zero_point, block);
      }
    }
  }

  // Units that a thread takes: a unit is a pair of panels for the rows of a tile.
  struct Range {
    int64_t first, last;
  };

  // Ranges get smaller towards the end, so that memory is read in long runs and all threads end together.
  Range next_range() {
    int64_t first = next_unit_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t left = num_units_ - first;
      if (left <= 0) return {num_units_, num_units_};
      const int64_t share = left / (2 * num_threads_), count = share > 1 ? share : 1;
      if (next_unit_.compare_exchange_weak(first, first + count, std::memory_order_relaxed)) return {first, first + count};
    }
  }

  // A thread knows its next unit while it multiplies one, and fetches its weights ahead.
  void take_units() {
    Range range = next_range();
    for (int64_t unit = range.first; unit < num_units_;) {
      if (unit + 1 == range.last) {
        range = next_range();
        multiply_unit(unit, range.first);
        unit = range.first;
      } else {
        multiply_unit(unit, unit + 1);
        ++unit;
      }
    }
  }

  void multiply_unit(int64_t unit, int64_t next) const {
    const int64_t pair = unit % num_pairs_, first = unit / num_pairs_ * rows_per_tile_;
    const int64_t left = num_rows_ - first, num_rows = left < rows_per_tile_ ? left : rows_per_tile_;
    const int64_t num_groups = (num_rows + kernels_.max_rows - 1) / kernels_.max_rows;
    const int64_t pair_bytes = 2 * shape_.panel_bytes(), slices = num_slices(shape_);
    Panels panels = {&shape_, packed_ + pair * pair_bytes, nullptr, 0, row_bytes_};
    const int64_t ahead_per_slice = next >= num_units_ ? 0 : (pair_bytes / (num_groups * slices) + 63) / 64 * 64;
    panels.ahead = packed_ + next % num_pairs_ * pair_bytes;
    for (int64_t group = 0, row = first; group < num_groups; ++group) {
      const int64_t count = (num_rows - (row - first)) / (num_groups - group);
      panels.ahead_per_slice = ahead_per_slice;
      for (int64_t panel = 0; panel < 2; panel += COLUMNS) {
        const int64_t column = pair * 2 * PANEL + panel * PANEL;
        const Rows rows = {quantized_ + row * row_bytes_, y_ + row * shape_.num_outputs + column,
                           shape_.num_outputs, shape_.num_outputs - column};
        for (int64_t lane = 0; lane < PANEL; lane += WIDTH) {
          kernels_.of[count - 1](panels, rows, lane);
          panels.ahead_per_slice = 0;
        }
        panels.packed += shape_.panel_bytes();
      }
      panels.packed = packed_ + pair * pair_bytes;
      panels.ahead += ahead_per_slice * slices;
      row += count;
    }
  }

  const WeightShape shape_;
  const uint8_t* packed_;
  const float* x_;
  float* y_;
  const int64_t num_rows_;
  const float x_scale_;
  const int64_t num_threads_;
  int64_t row_bytes_, rows_per_chunk_, num_chunks_, rows_per_tile_, num_pairs_, num_units_;
  int8_t* quantized_;
  Kernels kernels_;
  std::atomic<int64_t> next_chunk_{0}, chunks_done_{0}, next_unit_{0};
};

// Eight 4-bit numbers, pairs low half first, as four low halves and four high ones.
uint32_t halves_by_step(uint32_t pairs) {
  uint8_t numbers[8], bytes[4];
  for (int i = 0; i < 8; ++i) numbers[i] = pairs >> (4 * i) & 15;
  for (int i = 0; i < 4; ++i) bytes[i] = uint8_t(numbers[i] | numbers[i + 4] << 4);
  return load_as<uint32_t>(bytes);
}

void pack_panel(const WeightShape& shape, int64_t panel, const uint8_t* values, const float* scales,
                const uint8_t* zero_points, uint8_t* packed) {
  const int64_t num_blocks = shape.num_blocks(), num_scales = shape.num_scale_blocks();
  const int64_t zero_bytes = (num_blocks * shape.bits + 7) / 8;
  const int64_t block_bytes = shape.block_size * shape.bits / 8, padded_bytes = shape.padded_block() * shape.bits / 8;
  uint8_t* to_scales = packed + shape.integer_bytes();
  uint8_t* to_zeros = to_scales + shape.scale_bytes();
  std::memset(packed, 0, size_t(shape.panel_bytes()));
  for (int64_t lane = 0; lane < PANEL && panel * PANEL + lane < shape.num_outputs; ++lane) {
    const int64_t output = panel * PANEL + lane;
    uint8_t* to = packed + lane * 4;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const uint8_t* from = values + (output * num_blocks + block) * block_bytes;
      for (int64_t i = 0; i < padded_bytes; i += 4, to += PANEL * 4) {
        uint32_t four = 0;
        std::memcpy(&four, from + i, size_t(block_bytes - i < 4 ? block_bytes - i : 4));
        if (shape.bits == 4) four = halves_by_step(four);
        std::memcpy(to, &four, 4);
      }
      if (zero_points) {
        const uint8_t* row = zero_points + output * zero_bytes;
        to_zeros[block * PANEL + lane] = shape.bits == 8 ? row[block] : row[block / 2] >> (block % 2 * 4) & 15;
      }
    }
    for (int64_t block = 0; block < num_scales; ++block) {
      std::memcpy(to_scales + (block * PANEL + lane) * 4, scales + output * num_scales + block, 4);
    }
  }
}

void pack_channel_panel(const WeightShape& shape, int64_t panel, const int8_t* values, const float* scales,
                        uint8_t* packed) {
  const int64_t columns = shape.num_outputs - panel * PANEL, count = columns < PANEL ? columns : PANEL;
  std::memset(packed, 0, size_t(shape.panel_bytes()));
  for (int64_t block = 0, k = 0; block < shape.num_blocks(); ++block) {
    uint8_t* to = packed + block * shape.padded_block() * PANEL;
    for (int64_t i = 0; i < shape.block_size && k < shape.num_inputs; ++i, ++k) {
      const int8_t* from = values + k * shape.num_outputs + panel * PANEL;
      for (int64_t lane = 0; lane < count; ++lane) to[i / 4 * 4 * PANEL + lane * 4 + i % 4] = uint8_t(from[lane] + 128);
    }
  }
  if (count > 0) std::memcpy(packed + shape.integer_bytes(), scales + panel * PANEL, size_t(count) * 4);
}

void pack_blocks(const WeightShape& shape, const uint8_t* values, const float* scales, const uint8_t* zero_points,
                 uint8_t* packed, const Parallel& parallel) {
  parallel.each(size_t(shape.num_panels()), [&](size_t panel) {
    pack_panel(shape, int64_t(panel), values, scales, zero_points, packed + int64_t(panel) * shape.panel_bytes());
  });
}

void pack_channels(const WeightShape& shape, const int8_t* values, const float* scales, uint8_t* packed,
                   const Parallel& parallel) {
  parallel.each(size_t(shape.num_panels()), [&](size_t panel) {
    pack_channel_panel(shape, int64_t(panel), values, scales, packed + int64_t(panel) * shape.panel_bytes());
  });
}

void multiply(const WeightShape& shape, const uint8_t* packed, const float* x, int64_t num_rows, float x_scale,
              float* y, const Parallel& parallel) {
  if (num_rows == 0 || shape.num_outputs == 0) return;
  Product(shape, packed, x, num_rows, x_scale, y, parallel.num_threads).run(parallel);
}

}  // namespace

const LinearKernels linear_kernels = {pack_blocks, pack_channels, multiply};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
