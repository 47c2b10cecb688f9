// Cuts a call's work into items that threads take. How it is cut changes no result.
#pragma once

#include "attention.h"
#include "scratch.h"

namespace headrace {
namespace HEADRACE_VARIANT {

// Keys of a block. A block's part of the output is computed alone, and the parts of a row are added in order. So a long
// row can be cut between threads, and its result is the same where it is not.
constexpr int BLOCK = 256;

// Some new tokens of one row with all query heads of one key-value head, and some blocks of the keys that they see.
struct Item {
  int32_t row, head;
  int32_t first_token, num_tokens;  // within the row's new tokens
  int32_t first_block, last_block;  // last_block is not included
  int32_t share_idx;                // of several items for the same tokens; -1: this item has all blocks
};

// Where items that share their tokens put the parts of the output. The last one to end adds them up.
struct Share {
  int32_t first_block, num_blocks;
  int32_t items_left;  // only through atomic operations
  int64_t parts_idx;   // of the first part: parts are [block, query row]
};

struct Plan {
  Item* items;
  Share* shares;
  int64_t* first_token;  // of each row, within the packed tokens
  int32_t num_items, num_shares;
  int64_t num_parts;
};

inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The first key that the token at `position` sees.
inline int32_t first_key(const AttentionCall& call, int32_t position) {
  return call.window > 0 ? larger(0, position - call.window + 1) : 0;
}

// Pieces of work to make for each thread, so that they end at about the same time.
constexpr int PIECES_PER_THREAD = 6;

struct Cutter {
  const AttentionCall& call;
  int num_threads;
  int token_step;  // new tokens of an item

  // Floating point operations of an item, in proportion. A decode row costs as much as six: it waits for memory.
  double cost(int32_t num_tokens, int64_t num_keys) const {
    const int num_rows = num_tokens * (call.num_heads / call.num_kv_heads);
    return (double)num_keys * larger(num_rows, 6);
  }

  // Calls visit(row, first token, tokens, first block, last block, cost) for each piece of each row's new tokens.
  template <typename Visit>
  void each_piece(Visit&& visit) const {
    for (int32_t row = 0; row < call.num_rows; ++row) {
      for (int32_t token = 0; token < call.query_len[row]; token += token_step) {
        const int32_t count = smaller(token_step, call.query_len[row] - token);
        const int32_t position = call.past_len[row] + token;
        const int32_t from = first_key(call, position), to = position + count;
        visit(row, token, count, from / BLOCK, (to + BLOCK - 1) / BLOCK, cost(count, to - from));
      }
    }
  }
};

// How many new tokens an item takes: as many as the caches hold, but so that all threads have enough to do.
inline int choose_token_step(const AttentionCall& call, int num_threads) {
  const int group = call.num_heads / call.num_kv_heads;
  const int most = larger(1, larger(48, 12288 / call.head_dim) / group);  // packed keys and values are used so often
  const int least = larger(1, smaller(most, 48 / group));
  int64_t num_tokens = 0;
  for (int32_t row = 0; row < call.num_rows; ++row) num_tokens += call.query_len[row];
  const int64_t fair = num_tokens * call.num_kv_heads / (num_threads * PIECES_PER_THREAD);
  return fair < least ? least : fair < most ? (int)fair : most;
}

inline bool make_plan(const AttentionCall& call, int num_threads, Scratch& scratch, Plan& plan) {
  const Cutter cutter{call, num_threads, choose_token_step(call, num_threads)};
  double total = 0;
  int64_t num_pieces = 0;
  cutter.each_piece([&](int32_t, int32_t, int32_t, int32_t, int32_t, double cost) {
    total += cost;
    ++num_pieces;
  });
  const double fair = num_threads == 1 ? total * 2 : total * call.num_kv_heads / (num_threads * PIECES_PER_THREAD);
  const auto num_cuts = [&](int32_t first, int32_t last, double cost) {
    const double wanted = cost / fair;
    return wanted < 1.5 ? 1 : smaller((int32_t)(wanted + 0.5), last - first);
  };
  int64_t num_items = 0, num_shares = 0;
  cutter.each_piece([&](int32_t, int32_t, int32_t, int32_t first, int32_t last, double cost) {
    const int32_t cuts = num_cuts(first, last, cost);
    num_items += cuts;
    num_shares += cuts > 1;
  });
  const size_t heads = (size_t)call.num_kv_heads;
  const size_t room = sizeof(Item) * (size_t)num_items * heads + sizeof(Share) * (size_t)num_shares * heads +
                      sizeof(int64_t) * (size_t)call.num_rows + 3 * 64;
  if (!scratch.reset(room)) return false;
  plan.items = scratch.take<Item>((size_t)num_items * heads);
  plan.shares = scratch.take<Share>((size_t)num_shares * heads);
  plan.first_token = scratch.take<int64_t>((size_t)call.num_rows);
  plan.num_items = plan.num_shares = 0;
  plan.num_parts = 0;
  int64_t token = 0;
  for (int32_t row = 0; row < call.num_rows; ++row) {
    plan.first_token[row] = token;
    token += call.query_len[row];
  }
  const int group = call.num_heads / call.num_kv_heads;
  cutter.each_piece([&](int32_t row, int32_t first_token, int32_t num_tokens, int32_t first, int32_t last, double cost) {
    const int32_t cuts = num_cuts(first, last, cost);
    for (int32_t head = 0; head < call.num_kv_heads; ++head) {
      int32_t share_idx = -1;
      if (cuts > 1) {
        share_idx = plan.num_shares++;
        plan.shares[share_idx] = Share{first, last - first, cuts, plan.num_parts};
        plan.num_parts += (int64_t)(last - first) * num_tokens * group;
      }
      for (int32_t cut = 0; cut < cuts; ++cut) {
        const int32_t from = first + (int32_t)((int64_t)(last - first) * cut / cuts);
        const int32_t to = first + (int32_t)((int64_t)(last - first) * (cut + 1) / cuts);
        plan.items[plan.num_items++] = Item{row, head, first_token, num_tokens, from, to, share_idx};
      }
    }
  });
  return true;
}

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
