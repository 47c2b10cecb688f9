// See draw.h. Three passes at most: the highest logit, sums of blocks, and what comes before the drawn token.
#include "draw.h"

#include <cmath>
#include <cstdlib>

#include "../attention/softmax_math.h"
#include "../vec.h"

namespace headrace {
namespace HEADRACE_VARIANT {
namespace {

constexpr int64_t BLOCK = 256;
constexpr float LOG2_E = 1.44269504088896340736f;

// The row in blocks; behind its end the last one has logits of minus infinity.
class Blocks {
 public:
  explicit Blocks(const Draw& draw) : logits_(draw.logits), num_whole_(draw.num_logits / BLOCK) {
    const int64_t rest = draw.num_logits % BLOCK;
    count = num_whole_ + (rest > 0);
    for (int64_t i = 0; i < BLOCK; ++i) last_[i] = i < rest ? logits_[num_whole_ * BLOCK + i] : -INFINITY;
  }
  const float* operator[](int64_t block) const { return block < num_whole_ ? logits_ + block * BLOCK : last_; }

  int64_t count;

 private:
  const float* logits_;
  int64_t num_whole_;
  float last_[BLOCK];
};

// The highest logit; not a number if any logit is not.
float highest_of(const Blocks& blocks) {
  Vec most = splat(-INFINITY);
  VecI strange = {};
  for (int64_t block = 0; block < blocks.count; ++block) {
    const float* logits = blocks[block];
    for (int64_t i = 0; i < BLOCK; i += WIDTH) {
      const Vec value = load(logits + i);
      strange |= value != value;
      most = max(value, most);
    }
  }
  for (int i = 0; i < WIDTH; ++i) {
    if (strange[i]) return NAN;
  }
  return max_of(most);
}

// exp((logit - highest) / temperature), at most 1.
struct Weight {
  Vec highest, scale;
  HEADRACE_INLINE Vec operator()(Vec logit) const { return exp2_nonpositive((logit - highest) * scale); }
};

// The position at which the running sum passes `target`: the last with a weight if rounding leaves it below.
template <typename Number>
int64_t pass_of(const Number* weights, int64_t count, double& target) {
  int64_t last = 0;
  double before = 0, before_last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] <= 0) continue;
    last = i;
    before_last = before;
    before += weights[i];
    if (before > target) break;
  }
  target -= before_last;
  return last;
}

// Sum of the weights that are higher than the token's, and of the equal ones with lower ids.
double sum_before(const Draw& draw, const Blocks& blocks, const Weight& weight, int64_t token) {
  const Vec limit = splat(draw.logits[token]);
  Vec higher = {};
  int64_t num_equal = 0;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const float* logits = blocks[block];
    VecI any = {};
    for (int64_t i = 0; i < BLOCK; i += WIDTH) any |= load(logits + i) >= limit;
    bool found = false;
    for (int i = 0; i < WIDTH; ++i) found |= any[i] != 0;
    if (!found) continue;
    for (int64_t i = 0; i < BLOCK; i += WIDTH) {
      const Vec value = load(logits + i);
      higher += select(value > limit, weight(value), Vec{});
    }
    for (int64_t i = 0; i < BLOCK && block * BLOCK + i < token; ++i) num_equal += logits[i] == draw.logits[token];
  }
  return double(sum(higher)) + double(num_equal) * double(weight(limit)[0]);
}

// Memory of a thread, kept between calls. No std::vector: its functions would be shared by the variants.
struct Sums {
  double* memory = nullptr;
  int64_t capacity = 0;

  double* of(int64_t count) {
    if (count > capacity) {
      std::free(memory);
      memory = static_cast<double*>(std::malloc(size_t(count) * sizeof(double)));
      capacity = memory == nullptr ? 0 : count;
    }
    return memory;
  }
  ~Sums() { std::free(memory); }
};

int64_t draw(const Draw& draw) {
  const Blocks blocks(draw);
  const float highest = highest_of(blocks);
  if (!std::isfinite(highest)) return NOT_FINITE;
  const Weight weight = {splat(highest), splat(draw.inverse_temperature * LOG2_E)};
  thread_local Sums scratch;
  double* sums = scratch.of(blocks.count);
  if (sums == nullptr) return NO_MEMORY;
  double total = 0;
  for (int64_t block = 0; block < blocks.count; ++block) {
    Vec added = {};
    for (int64_t i = 0; i < BLOCK; i += WIDTH) added += weight(load(blocks[block] + i));
    sums[block] = sum(added);
    total += sums[block];
  }
  double target = draw.uniform * total;
  const int64_t block = pass_of(sums, blocks.count, target);
  float weights[BLOCK];
  for (int64_t i = 0; i < BLOCK; i += WIDTH) store(weights + i, weight(load(blocks[block] + i)));
  const int64_t within = pass_of(weights, BLOCK, target), token = block * BLOCK + within;
  if (weights[within] < draw.min_p) return DROPPED;
  const double limit = draw.top_p * total;
  if (draw.top_p >= 1 || weights[within] > total - limit) return token;
  return sum_before(draw, blocks, weight, token) < limit ? token : DROPPED;
}

}  // namespace

const DrawKernels draw_kernels = {draw};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
