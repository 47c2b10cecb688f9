// Attention: writes the new keys and values, then runs the items of the plan (plan.h) on the caller's threads.
//
// An item goes over its blocks of keys in order. In a block it scores the query rows against packed keys, softens the
// scores, and mixes the values (tiles.h). Every query head of a key-value head is a row of the same tile, so
// keys and values are read once. The parts of the output that the blocks give are added in the order of the blocks.
#include "attention.h"

#include "plan.h"
#include "rows.h"
#include "tiles.h"

namespace headrace {
namespace HEADRACE_VARIANT {
namespace {

constexpr float LOG2_E = 1.44269504088896340736f;

// A block's part of a query row's output, or the sum of some parts: the weights in it are 2^(score - most).
struct Part {
  float most;
  float total;  // 0: the row sees no key of the block, and `sums` is not to be read
};

template <typename T>
struct Attention {
  const AttentionCall& call;
  const Plan& plan;
  Part* parts;        // of shared items
  float* part_sums;   // [part, padded_dim]
  int group;          // query heads of a key-value head
  int padded_dim;     // head_dim rounded up to vectors
  float cap;          // what tanh is multiplied with, in powers of 2
  float query_scale;  // makes scores powers of 2, or arguments of tanh_of_log2

  T* cached(void* cache, int32_t row, int32_t head) const {
    return static_cast<T*>(cache) + ((int64_t)call.slot[row] * call.num_kv_heads + head) * call.capacity * call.head_dim;
  }

  const float* packed(int32_t row, int32_t token, int32_t head) const {
    const int64_t heads = call.num_heads + 2 * call.num_kv_heads;
    return call.qkv + ((plan.first_token[row] + token) * heads + head) * call.head_dim;
  }

  // Write the keys and values of new tokens. room: [head_dim]
  void append(int32_t row, int32_t head, int32_t first_token, int32_t num_tokens, float* room) const {
    T* keys = cached(call.key_cache, row, head);
    T* values = cached(call.value_cache, row, head);
    const int64_t scales = (int64_t)head * call.head_dim;
    for (int32_t token = first_token; token < first_token + num_tokens; ++token) {
      const int64_t position = call.past_len[row] + token;
      prepare_head(call, packed(row, token, call.num_heads + head), call.k_norm, position, room);
      round_head(room, call.k_scale ? call.k_scale + scales : nullptr, call.head_dim, keys + position * call.head_dim);
      round_head(packed(row, token, call.num_heads + call.num_kv_heads + head),
                 call.v_scale ? call.v_scale + scales : nullptr, call.head_dim, values + position * call.head_dim);
    }
  }

  struct Room {
    float *queries, *panels, *values, *scores, *sums, *fresh_sums;
    Part *state, *fresh;
  };

  bool take_room(Scratch& scratch, int num_rows, Room& room) const {
    const size_t dim = (size_t)call.head_dim, padded = (size_t)padded_dim, rows = (size_t)num_rows;
    const size_t floats = rows * (dim + padded) + BLOCK * (dim + padded) + MOST_ROWS * (BLOCK + padded);
    if (!scratch.reset(sizeof(float) * floats + sizeof(Part) * (rows + MOST_ROWS) + 8 * 64)) return false;
    room.queries = scratch.take<float>(rows * dim);
    room.panels = scratch.take<float>(BLOCK * dim);
    room.values = scratch.take<float>(BLOCK * padded);
    room.scores = scratch.take<float>(MOST_ROWS * BLOCK);
    room.sums = scratch.take<float>(rows * padded);
    room.fresh_sums = scratch.take<float>(MOST_ROWS * padded);
    room.state = scratch.take<Part>(rows);
    room.fresh = scratch.take<Part>(MOST_ROWS);
    return true;
  }

  void prepare_queries(const Item& item, float* queries) const {
    const float* key_scale = call.k_scale ? call.k_scale + (int64_t)item.head * call.head_dim : nullptr;
    for (int32_t token = item.first_token; token < item.first_token + item.num_tokens; ++token) {
      for (int32_t i = 0; i < group; ++i, queries += call.head_dim) {
        prepare_head(call, packed(item.row, token, item.head * group + i), call.q_norm, call.past_len[item.row] + token, queries);
        for (int channel = 0; channel < call.head_dim; ++channel) queries[channel] *= query_scale;
        if (!key_scale) continue;
        for (int channel = 0; channel < call.head_dim; ++channel) queries[channel] *= key_scale[channel];
      }
    }
  }

  // ROWS query rows from `first_row` of the item against keys first_key .. of the block: the parts of the output.
  // keys: of the block, if they are still to be packed; else null, and room.panels holds them
  template <int ROWS, typename V>
  void attend_tile(const Item& item, int first_row, int32_t block_start, int32_t num_keys, const Room& room, const T* keys,
                   const V* values, int values_stride, Part* parts_out, float* sums_out, const Ahead& next_keys) const {
    const int32_t past = call.past_len[item.row] + item.first_token;
    const int32_t first_position = past + first_row / group, last_position = past + (first_row + ROWS - 1) / group;
    const int32_t from = larger(first_key(call, first_position) - block_start, 0) / WIDTH * WIDTH;
    const int32_t to = smaller(last_position + 1 - block_start, num_keys);
    if (to <= from) {
      for (int i = 0; i < ROWS; ++i) parts_out[i] = Part{LOWEST, 0.0f};
      return;
    }
    const int num_panels = (to - from + WIDTH - 1) / WIDTH;
    const float* queries = room.queries + (int64_t)first_row * call.head_dim;
    Ahead ahead;
    if (!keys) {
      score_rows<ROWS>(queries, call.head_dim, room.panels + (int64_t)from * call.head_dim, num_panels, room.scores + from, BLOCK);
    } else {
      ahead.start(values + (int64_t)from * values_stride, (int64_t)(to - from) * values_stride * (int64_t)sizeof(V));
      score_unpacked<ROWS>(queries, call.head_dim, keys + (int64_t)from * call.head_dim, to - from, room.scores + from, BLOCK, ahead);
    }
    ahead = next_keys;
    for (int i = 0; i < ROWS; ++i) {
      const int32_t position = past + (first_row + i) / group;
      const RowSum sum = soften(room.scores + i * BLOCK, from, from + num_panels * WIDTH, first_key(call, position) - block_start,
                                smaller(position + 1 - block_start, num_keys), cap);
      parts_out[i] = Part{sum.most, sum.total};
    }
    mix_rows<ROWS>(room.scores + from, BLOCK, values + (int64_t)from * values_stride, values_stride, to - from,
                   padded_dim / WIDTH, sums_out, padded_dim, ahead);
  }

  template <typename V>
  void attend_rows(int num_rows, const Item& item, int first_row, int32_t block_start, int32_t num_keys, const Room& room,
                   const T* keys, const V* values, int values_stride, Part* parts_out, float* sums_out, const Ahead& next) const {
    switch (num_rows) {
      case 1: return attend_tile<1>(item, first_row, block_start, num_keys, room, keys, values, values_stride, parts_out, sums_out, next);
      case 2: return attend_tile<2>(item, first_row, block_start, num_keys, room, keys, values, values_stride, parts_out, sums_out, next);
      case 3: return attend_tile<3>(item, first_row, block_start, num_keys, room, keys, values, values_stride, parts_out, sums_out, next);
      case 4: return attend_tile<4>(item, first_row, block_start, num_keys, room, keys, values, values_stride, parts_out, sums_out, next);
      case 5: return attend_tile<5>(item, first_row, block_start, num_keys, room, keys, values, values_stride, parts_out, sums_out, next);
      default: return attend_tile<6>(item, first_row, block_start, num_keys, room, keys, values, values_stride, parts_out, sums_out, next);
    }
  }

  // Adds a part to the sum of the parts before it. Every row goes through here with the same parts in the same order.
  void add_part(Part& state, float* sums, const Part& part, const float* part_sums) const {
    if (part.total == 0.0f) return;
    if (state.total == 0.0f) {
      state = part;
      std::memcpy(sums, part_sums, sizeof(float) * (size_t)padded_dim);
      return;
    }
    const float most = part.most > state.most ? part.most : state.most;
    const Vec old_factor = exp2_nonpositive(splat(state.most - most)), new_factor = exp2_nonpositive(splat(part.most - most));
    for (int channel = 0; channel < padded_dim; channel += WIDTH) {
      store(sums + channel, fma(load(part_sums + channel), new_factor, load(sums + channel) * old_factor));
    }
    state = Part{most, fma(part.total, new_factor[0], state.total * old_factor[0])};
  }

  // 1 / sum of the weights, the sink's among them.
  float inverse_total(const Part& state, int head) const {
    if (!call.sinks) return 1.0f / state.total;
    const float sink = call.sinks[head] * LOG2_E;
    if (sink <= state.most) return 1.0f / (state.total + exp2_nonpositive(sink - state.most));
    const float factor = exp2_nonpositive(state.most - sink);
    return factor / fma(state.total, factor, 1.0f);
  }

  // Divide by the sum of the weights and write the outputs of the item's query rows. Adding 0 leaves one kind of zero.
  void finish(const Item& item, const Part* state, const float* sums) const {
    const float* value_scale = call.v_scale ? call.v_scale + (int64_t)item.head * call.head_dim : nullptr;
    for (int32_t i = 0; i < item.num_tokens * group; ++i, sums += padded_dim) {
      const int64_t token = plan.first_token[item.row] + item.first_token + i / group;
      float* out = call.out + (token * call.num_heads + item.head * group + i % group) * call.head_dim;
      const float inverse = inverse_total(state[i], item.head * group + i % group);
      if (value_scale) {
        for (int channel = 0; channel < call.head_dim; ++channel) out[channel] = sums[channel] * inverse * value_scale[channel] + 0.0f;
      } else {
        for (int channel = 0; channel < call.head_dim; ++channel) out[channel] = sums[channel] * inverse + 0.0f;
      }
    }
  }

  // next: the item that this thread takes next, or null
  bool run(const Item& item, const Item* next, Scratch& scratch) const {
    const int num_rows = item.num_tokens * group, dim = call.head_dim;
    const int num_tiles = (num_rows + MOST_ROWS - 1) / MOST_ROWS;
    Room room;
    if (!take_room(scratch, num_rows, room)) return false;
    const int32_t last_key = call.past_len[item.row] + item.first_token + item.num_tokens;
    if (call.query_len[item.row] == 1 && item.last_block * BLOCK >= last_key) append(item.row, item.head, 0, 1, room.panels);
    prepare_queries(item, room.queries);
    for (int i = 0; i < num_rows; ++i) room.state[i] = Part{LOWEST, 0.0f};
    const Share* share = item.share_idx < 0 ? nullptr : &plan.shares[item.share_idx];
    for (int32_t block = item.first_block; block < item.last_block; ++block) {
      const int32_t start = block * BLOCK, num_keys = smaller(last_key - start, BLOCK);
      const T* keys = cached(call.key_cache, item.row, item.head) + (int64_t)start * dim;
      const T* values = cached(call.value_cache, item.row, item.head) + (int64_t)start * dim;
      Ahead next_keys;
      if (num_tiles > 1) pack_keys(keys, num_keys, dim, room.panels);
      if (num_tiles == 1 && block + 1 < item.last_block) {
        next_keys.start(keys + (int64_t)BLOCK * dim, (int64_t)sizeof(T) * dim * smaller(last_key - start - BLOCK, BLOCK));
      } else if (num_tiles == 1 && next) {
        const int32_t first = next->first_block * BLOCK, end = call.past_len[next->row] + next->first_token + next->num_tokens;
        next_keys.start(cached(call.key_cache, next->row, next->head) + (int64_t)first * dim,
                        (int64_t)sizeof(T) * dim * smaller(end - first, BLOCK));
      }
      const bool is_direct = padded_dim == dim && (num_tiles == 1 || sizeof(T) == sizeof(float));
      if (!is_direct) widen_values(values, num_keys, dim, padded_dim, room.values);
      for (int tile = 0, row = 0; tile < num_tiles; ++tile) {
        const int count = (num_rows - row + num_tiles - tile - 1) / (num_tiles - tile);
        const int64_t part = share ? share->parts_idx + (int64_t)(block - share->first_block) * num_rows + row : 0;
        Part* parts_out = share ? parts + part : room.fresh;
        float* sums_out = share ? part_sums + part * padded_dim : room.fresh_sums;
        if (is_direct) {
          attend_rows(count, item, row, start, num_keys, room, num_tiles == 1 ? keys : nullptr, values, dim, parts_out, sums_out, next_keys);
        } else {
          attend_rows(count, item, row, start, num_keys, room, num_tiles == 1 ? keys : nullptr, room.values, padded_dim, parts_out, sums_out, next_keys);
        }
        for (int i = 0; i < count && !share; ++i) {
          add_part(room.state[row + i], room.sums + (int64_t)(row + i) * padded_dim, room.fresh[i],
                   room.fresh_sums + (int64_t)i * padded_dim);
        }
        row += count;
      }
    }
    if (share) {
      if (__atomic_sub_fetch(&plan.shares[item.share_idx].items_left, 1, __ATOMIC_ACQ_REL) > 0) return true;
      for (int32_t block = 0; block < share->num_blocks; ++block) {
        for (int i = 0; i < num_rows; ++i) {
          const int64_t part = share->parts_idx + (int64_t)block * num_rows + i;
          add_part(room.state[i], room.sums + (int64_t)i * padded_dim, parts[part], part_sums + part * padded_dim);
        }
      }
    }
    finish(item, room.state, room.sums);
    return true;
  }
};

thread_local Scratch item_scratch;
thread_local Scratch plan_scratch;
thread_local Scratch part_scratch;

// New tokens of a task that writes keys and values ahead of attention.
constexpr int APPEND_STEP = 32;

template <typename T>
bool run_call(const AttentionCall& call, const Parallel& parallel) {
  Plan plan;
  if (!make_plan(call, parallel.num_threads, plan_scratch, plan)) return false;
  const int padded = (call.head_dim + WIDTH - 1) / WIDTH * WIDTH;
  if (!part_scratch.reset((sizeof(Part) + sizeof(float) * (size_t)padded) * (size_t)plan.num_parts + 2 * 64)) return false;
  Part* parts = part_scratch.take<Part>((size_t)plan.num_parts);
  float* part_sums = part_scratch.take<float>((size_t)plan.num_parts * (size_t)padded);
  const bool is_capped = call.softcap > 0.0f;
  const Attention<T> attention{call, plan, parts, part_sums, call.num_heads / call.num_kv_heads, padded,
                               is_capped ? call.softcap * LOG2_E : 0.0f,
                               is_capped ? call.scale / call.softcap * (2.0f * LOG2_E) : call.scale * LOG2_E};
  int32_t is_short_of_memory = 0;
  // Items of several tokens read keys that other items would write, so those are written first.
  for (int32_t row = 0; row < call.num_rows; ++row) {
    const int32_t count = call.query_len[row];
    if (count <= 1) continue;
    const int32_t num_steps = (count + APPEND_STEP - 1) / APPEND_STEP;
    parallel.each((size_t)(num_steps * call.num_kv_heads), [&](size_t task) {
      const int32_t token = (int32_t)(task % (size_t)num_steps) * APPEND_STEP, head = (int32_t)(task / (size_t)num_steps);
      if (!item_scratch.reset(sizeof(float) * (size_t)call.head_dim)) {
        __atomic_store_n(&is_short_of_memory, 1, __ATOMIC_RELAXED);
        return;
      }
      attention.append(row, head, token, smaller(APPEND_STEP, count - token), item_scratch.take<float>((size_t)call.head_dim));
    });
  }
  const int32_t num_tasks = smaller(plan.num_items, parallel.num_threads == 1 ? 1 : parallel.num_threads * PIECES_PER_THREAD);
  parallel.each((size_t)num_tasks, [&](size_t task) {
    const int32_t first = (int32_t)((int64_t)plan.num_items * (int64_t)task / num_tasks);
    const int32_t last = (int32_t)((int64_t)plan.num_items * (int64_t)(task + 1) / num_tasks);
    for (int32_t i = first; i < last; ++i) {
      const Item* next = i + 1 < plan.num_items ? &plan.items[i + 1] : nullptr;
      if (!attention.run(plan.items[i], next, item_scratch)) __atomic_store_n(&is_short_of_memory, 1, __ATOMIC_RELAXED);
    }
  });
  return !is_short_of_memory;
}

bool attend(const AttentionCall& call, const Parallel& parallel) {
  switch (call.cache_type) {
    case CACHE_FLOAT32: return run_call<float>(call, parallel);
    case CACHE_FLOAT16: return run_call<uint16_t>(call, parallel);
    default: return run_call<int8_t>(call, parallel);
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {attend};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
