// The PGD step in place, and the random start, on the CPU. Called through a plain C interface, so that it is built
// without torch. Semantics: poisonshield/ops/pgd/reference.py; ball steps in two passes as in csrc/pgd.cu.
#include "pgd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <vector>

#include "threads.h"

#define POISONSHIELD_KERNELS "pgd_kernels.h"
#include "levels.h"

namespace poisonshield {
namespace {

constexpr int64_t kWorthAThread = 1 << 16;  // elements
constexpr int64_t kPiecesOfAUnit = 16;

// The space of x at the places of one piece: a channel's numbers, element by element where channels differ.
class PieceSpace {
 public:
  explicit PieceSpace(const PgdCall& call) : call_(call), values_(4 * (call.std ? kPiece + 8 : 1)) {
    length_ = int64_t(values_.size()) / 4;
    if (!call.std) put(0, 1, 0.0f, 1.0f);
  }

  // For elements first .. first+count-1 of a sample.
  void move(int64_t first, int64_t count) {
    if (!call_.std) return;
    const int64_t inner = call_.channel_step;
    int64_t channel = first / inner % call_.channels, left = inner - first % inner;
    for (int64_t i = 0; i < count;) {
      const int64_t run = std::min(left, count - i);
      put(i, run, call_.mean[channel], call_.std[channel]);
      i += run;
      left = inner;
      channel = channel + 1 == call_.channels ? 0 : channel + 1;
    }
  }

  Space get() const {
    const float* v = values_.data();
    return {v, v + length_, v + 2 * length_, v + 3 * length_, call_.std != nullptr};
  }

 private:
  void put(int64_t i, int64_t run, float mean, float std) {
    const float numbers[4] = {mean, std, (call_.low - mean) / std, (call_.high - mean) / std};
    for (int k = 0; k < 4; ++k) std::fill_n(values_.begin() + k * length_ + i, run, numbers[k]);
  }

  const PgdCall& call_;
  std::vector<float> values_;
  int64_t length_;
};

int64_t pieces_of(const PgdCall& c) { return (c.count + kPiece - 1) / kPiece; }

int64_t threads_for(const PgdCall& c) {
  return std::min(std::max<int64_t>(1, c.threads), std::max<int64_t>(1, c.batch * c.count / kWorthAThread));
}

// work(sample, piece, its first element, its elements, space) for pieces first .. last-1 of a sample.
template <class Work>
void over_pieces(const PgdCall& c, int64_t sample, int64_t first, int64_t last, const Work& work) {
  PieceSpace space(c);
  for (int64_t piece = first; piece < last; ++piece) {
    const int64_t element = piece * kPiece, count = std::min(kPiece, c.count - element);
    space.move(element, count);
    work(sample, piece, element, count, space.get());
  }
}

// The same for all samples that are to change, some pieces at a time, on several threads.
template <class Work>
void over_all(const PgdCall& c, const Work& work) {
  const int64_t pieces = pieces_of(c), parts = (pieces + kPiecesOfAUnit - 1) / kPiecesOfAUnit;
  in_parallel(c.batch * parts, threads_for(c), [&](int64_t unit) {
    const int64_t sample = unit / parts, first = unit % parts * kPiecesOfAUnit;
    if (c.active && !c.active[sample]) return;
    over_pieces(c, sample, first, std::min(pieces, first + kPiecesOfAUnit), work);
  });
}

struct Move {
  double scale;
  float shrink;
};

// |d + a v|^2 = |d|^2 + 2 a <d, v> + a^2 |v|^2 is the squared distance after the step, before it is taken.
Move move_of(const PgdCall& c, int64_t sample, const Sums* parts, int64_t count) {
  Sums all = {0, 0, 0};
  for (int64_t i = 0; i < count; ++i) {
    all.vv += parts[i].vv;
    all.vd += parts[i].vd;
    all.dd += parts[i].dd;
  }
  double scale = c.step[sample];
  if (c.norm == kL2) scale = all.vv > 0 && std::isfinite(all.vv) ? scale / std::sqrt(all.vv) : 0.0;
  const double moved = scale != 0 ? all.dd + 2 * scale * all.vd + scale * scale * all.vv : all.dd;
  const double length = std::sqrt(moved > 0 ? moved : (std::isnan(moved) ? moved : 0.0)), eps = c.eps[sample];
  return {scale, length > eps ? float(eps / length) : 1.0f};
}

void linf_step(const PgdCall& c) {
  const auto run = POISONSHIELD_BEST(linf_run);
  over_all(c, [&](int64_t sample, int64_t, int64_t element, int64_t count, const Space& space) {
    run(c, space, sample, sample * c.count + element, count);
  });
}

// Sums first, then the step: sample by sample, while it is in the cache, or over all where samples are few.
void ball_step(const PgdCall& c) {
  const auto sums_of = POISONSHIELD_BEST(ball_sums);
  const auto run = POISONSHIELD_BEST(ball_run);
  const int64_t pieces = pieces_of(c);
  std::vector<Sums> sums(c.batch * pieces);
  const auto add = [&](int64_t sample, int64_t piece, int64_t element, int64_t count, const Space& space) {
    sums[sample * pieces + piece] = sums_of(c, space, sample * c.count + element, count);
  };
  std::vector<Move> moves(c.batch);
  const auto decide = [&](int64_t sample) { moves[sample] = move_of(c, sample, sums.data() + sample * pieces, pieces); };
  const auto move = [&](int64_t sample, int64_t, int64_t element, int64_t count, const Space& space) {
    run(c, space, moves[sample].scale, moves[sample].shrink, sample * c.count + element, count);
  };
  const int64_t threads = threads_for(c);
  if (c.batch < threads) {
    over_all(c, add);
    for (int64_t sample = 0; sample < c.batch; ++sample) decide(sample);
    over_all(c, move);
    return;
  }
  in_parallel(c.batch, threads, [&](int64_t sample) {
    if (c.active && !c.active[sample]) return;
    over_pieces(c, sample, 0, pieces, add);
    decide(sample);
    over_pieces(c, sample, 0, pieces, move);
  });
}

void linf_start(const PgdCall& c) {
  const auto run = POISONSHIELD_BEST(start_run);
  over_all(c, [&](int64_t sample, int64_t, int64_t element, int64_t count, const Space& space) {
    run(c, space, sample, element, sample * c.count + element, count);
  });
}

int guarded(const PgdCall* call, void (*work)(const PgdCall&)) {
  if (call->size != sizeof(PgdCall)) return 2;
  try {
    work(*call);
    return 0;
  } catch (const std::exception&) {  // memory, which is all that can be short
    return 1;
  }
}

}  // namespace
}  // namespace poisonshield

extern "C" {

// 0, or 1 where memory is short, or 2 for a record of another version.
__attribute__((visibility("default"))) int poisonshield_pgd_step(const poisonshield::PgdCall* call) {
  using namespace poisonshield;
  return guarded(call, call->norm == kLinf ? linf_step : ball_step);
}

__attribute__((visibility("default"))) int poisonshield_pgd_start(const poisonshield::PgdCall* call) {
  return poisonshield::guarded(call, poisonshield::linf_start);
}
}
