// One pass over weight, gradient, base buffers and dual V of every tensor: the split LBI step of split_lbi.py.
// The norm of every unit is summed while V is written, so the next step needs no pass of its own for the prox.
// Tensors are dense; memory runs as [outer][units][run] entries, the units along one axis.
// Results do not depend on the number of threads: work is cut into the same pieces whoever does them.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <thread>
#include <vector>

namespace {

constexpr int64_t PIECE = 1 << 16;   // entries of one piece of work, at least
constexpr int64_t CHECKED = 1 << 20; // entries of one piece of the check, which only reads
constexpr int64_t AHEAD = 512;       // entries to fetch ahead of it
constexpr int64_t MOST_PIECES = 64;  // of one tensor whose pieces each keep sums over all units
constexpr int64_t BLOCK = 512;      // entries whose squares are summed in the arithmetic of V, before going on in double

enum Base { PLAIN, MOMENTUM, NESTEROV, ADAMW };
enum Penalty { NONE, L1, GROUP };
enum Dtype { FLOAT, DOUBLE, BFLOAT16 };

struct bfloat16 { uint16_t bits; };

template <typename S> S load(const float* p) { return *p; }
template <typename S> S load(const double* p) { return *p; }
template <typename S> S load(const bfloat16* p) {
  uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename S> void store(float* p, S value) { *p = value; }
template <typename S> void store(double* p, S value) { *p = value; }
template <typename S> void store(bfloat16* p, S value) {
  uint32_t bits;
  float narrow = value;
  std::memcpy(&bits, &narrow, 4);
  // to nearest, ties to even; infinities stay
  p->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

extern "C" {

struct Tensor {
  void *weight, *grad, *buffer, *square, *dual;
  int64_t* updates;      // AdamW's step counter
  void* l1_threshold;    // one value
  int64_t numel, outer, units, run, dtype;
  double scale;
};

struct Group {
  int64_t penalty, base, first, tensors, units, wide;  // wide: V and unit values are double
  void *norm, *threshold;
  int64_t *entered, *left, *step;
  double lr, kappa, nu, path_scale, momentum, weight_decay, decoupled, beta1, beta2, eps;
};

}

namespace {

struct Piece { int64_t group, tensor, begin, end; std::vector<double> squares; };  // squares: sums of its own, by unit

// Factors of one tensor's update, in the arithmetic of its V.
template <typename S> struct Rates {
  S base, coupling, path, kappa, momentum, decay, shrink, rest1, beta2, rest2, eps, root, mean;
  Rates(const Group& g, const Tensor& t) {
    double step = g.kappa * g.lr;
    base = step; coupling = step / g.nu; path = g.path_scale * g.lr / g.nu; kappa = g.kappa; momentum = g.momentum;
    decay = g.decoupled ? 0 : g.weight_decay;
    shrink = g.decoupled ? 1 - step * g.weight_decay : 1;
    rest1 = 1 - g.beta1; beta2 = g.beta2; rest2 = 1 - g.beta2; eps = g.eps;
    double count = t.updates ? double(*t.updates) : 1;
    root = g.base == ADAMW ? 1 / std::sqrt(1 - std::pow(g.beta2, count)) : 1;
    mean = g.base == ADAMW ? 1 / (1 - std::pow(g.beta1, count)) : 1;
  }
};

// The update of entry i; `gap` is W - Gamma (0 where nothing is lifted).
template <int BASE, typename W, typename S>
inline void move(const Rates<S>& r, W* weight, const W* grad, W* buffer, W* square, int64_t i, S old, S gap) {
  S g = load<S>(grad + i) + r.decay * old, d = g;
  if constexpr (BASE == MOMENTUM || BASE == NESTEROV) {
    store<S>(buffer + i, r.momentum * load<S>(buffer + i) + g);
    S b = load<S>(buffer + i);
    d = BASE == NESTEROV ? g + r.momentum * b : b;
  } else if constexpr (BASE == ADAMW) {
    S m = load<S>(buffer + i), v = load<S>(square + i);
    store<S>(buffer + i, m + r.rest1 * (g - m));
    store<S>(square + i, r.beta2 * v + r.rest2 * g * g);
    d = load<S>(buffer + i) * r.mean / (std::sqrt(load<S>(square + i)) * r.root + r.eps);
  }
  store<S>(weight + i, old * r.shrink - r.base * d - r.coupling * gap);
}

template <int BASE, typename W, typename S> void run_plain(const Group& g, const Tensor& t, int64_t begin, int64_t end) {
  const Rates<S> r(g, t);
  W *w = (W*)t.weight, *b = (W*)t.buffer, *q = (W*)t.square;
  const W* grad = (const W*)t.grad;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) move<BASE, W, S>(r, w, grad, b, q, i, load<S>(w + i), S(0));
}

template <int BASE, typename W, typename S> void run_l1(const Group& g, const Tensor& t, int64_t begin, int64_t end) {
  const Rates<S> r(g, t);
  W *w = (W*)t.weight, *b = (W*)t.buffer, *q = (W*)t.square;
  const W* grad = (const W*)t.grad;
  S* dual = (S*)t.dual;
  const S threshold = *(const S*)t.l1_threshold;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    S old = load<S>(w + i), v = dual[i];
    S inside = v > threshold ? threshold : v < -threshold ? -threshold : v;
    S gap = old - r.kappa * (v - inside);
    dual[i] = v + r.path * gap;
    move<BASE, W, S>(r, w, grad, b, q, i, old, gap);
  }
}

template <typename S> S factor_of(const Group& g, int64_t unit) {
  S norm = ((const S*)g.norm)[unit], threshold = ((const S*)g.threshold)[unit];
  return norm > threshold ? S(g.kappa) * (1 - threshold / norm) : S(0);
}

// Units one after the other in memory: every unit is a run of entries with one factor.
template <int BASE, typename W, typename S>
void run_units(const Group& g, const Tensor& t, int64_t begin, int64_t end, double* squares) {
  const Rates<S> r(g, t);
  W *w = (W*)t.weight, *b = (W*)t.buffer, *q = (W*)t.square;
  const W* grad = (const W*)t.grad;
  S* dual = (S*)t.dual;
  for (int64_t unit = begin; unit < end; ++unit) {
    const S factor = factor_of<S>(g, unit);
    double total = 0;
    const int64_t stop = (unit + 1) * t.run;
    for (int64_t from = unit * t.run; from < stop; from += BLOCK) {
      const int64_t to = from + BLOCK < stop ? from + BLOCK : stop;
      S sum = 0;
      if (grad) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = from; i < to; ++i) {
          S old = load<S>(w + i), v = dual[i], gap = old - factor * v;
          v += r.path * gap;
          dual[i] = v;
          sum += v * v;
          move<BASE, W, S>(r, w, grad, b, q, i, old, gap);
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = from; i < to; ++i) sum += dual[i] * dual[i];
      }
      total += sum;
    }
    squares[unit] = total;
  }
}

// Units side by side in rows of memory (an input axis, say): factors and sums lie in rows as long.
template <int BASE, typename W, typename S>
void run_rows(const Group& g, const Tensor& t, int64_t begin, int64_t end, double* squares) {
  const Rates<S> r(g, t);
  const int64_t width = t.units * t.run;
  const W* grad = (const W*)t.grad;
  std::vector<S> factors(width), sums(width, S(0));
  for (int64_t unit = 0; unit < t.units; ++unit) {
    const S factor = factor_of<S>(g, unit);
    for (int64_t j = 0; j < t.run; ++j) factors[unit * t.run + j] = factor;
  }
  S *sum = sums.data(), *factor = factors.data();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * width;
    W *w = (W*)t.weight + at, *b = t.buffer ? (W*)t.buffer + at : nullptr, *q = t.square ? (W*)t.square + at : nullptr;
    S* dual = (S*)t.dual + at;
    if (grad) {
      const W* gr = grad + at;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        S old = load<S>(w + i), v = dual[i], gap = old - factor[i] * v;
        v += r.path * gap;
        dual[i] = v;
        sum[i] += v * v;
        move<BASE, W, S>(r, w, gr, b, q, i, old, gap);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] += dual[i] * dual[i];
    }
  }
  for (int64_t unit = 0; unit < t.units; ++unit)
    for (int64_t j = 0; j < t.run; ++j) squares[unit] += sums[unit * t.run + j];
}

template <int BASE, typename W, typename S> void run_piece(const Group& g, const Tensor& t, Piece& piece, double* squares) {
  if (g.penalty == GROUP && t.outer == 1) run_units<BASE, W, S>(g, t, piece.begin, piece.end, squares);
  else if (g.penalty == GROUP) run_rows<BASE, W, S>(g, t, piece.begin, piece.end, piece.squares.data());
  else if (!t.grad) return;
  else if (g.penalty == L1) run_l1<BASE, W, S>(g, t, piece.begin, piece.end);
  else run_plain<BASE, W, S>(g, t, piece.begin, piece.end);
}

template <typename W, typename S> void run_base(const Group& g, const Tensor& t, Piece& piece, double* squares) {
  switch (g.base) {
    case PLAIN: return run_piece<PLAIN, W, S>(g, t, piece, squares);
    case MOMENTUM: return run_piece<MOMENTUM, W, S>(g, t, piece, squares);
    case NESTEROV: return run_piece<NESTEROV, W, S>(g, t, piece, squares);
    default: return run_piece<ADAMW, W, S>(g, t, piece, squares);
  }
}

// The carried norms of the new V, and who entered and left the support.
template <typename S> void record(const Group& g, const std::vector<double>& squares) {
  S *norm = (S*)g.norm, *threshold = (S*)g.threshold;
  for (int64_t unit = 0; unit < g.units; ++unit) {
    const bool was_in = norm[unit] > threshold[unit];
    norm[unit] = std::sqrt(squares[unit]);
    const bool is_in = norm[unit] > threshold[unit];
    if (is_in && g.entered[unit] < 0) g.entered[unit] = *g.step;
    if (was_in && !is_in) g.left[unit] = *g.step;
    if (is_in) g.left[unit] = -1;
  }
}

template <typename Work> void in_parallel(int64_t count, int64_t threads, Work work) {
  std::atomic<int64_t> next{0};
  auto worker = [&] { for (int64_t i; (i = next++) < count;) work(i); };
  std::vector<std::thread> team;
  for (int64_t i = 1; i < threads && i < count; ++i) team.emplace_back(worker);
  worker();
  for (auto& thread : team) thread.join();
}

// Four places at once, fetched ahead: one stream of reads alone does not use the memory's bandwidth.
template <typename Bits, Bits EXPONENT> bool all_finite(const void* data, int64_t begin, int64_t end) {
  constexpr int64_t LINE = 64 / sizeof(Bits);
  const int64_t quarter = (end - begin) / 4 / LINE * LINE;
  const Bits *one = (const Bits*)data + begin, *two = one + quarter, *three = two + quarter, *four = three + quarter;
  Bits broken = 0;
  for (int64_t from = 0; from < quarter; from += LINE) {
    for (const Bits* place : {one, two, three, four}) __builtin_prefetch(place + from + AHEAD);
#pragma omp simd reduction(| : broken)
    for (int64_t i = from; i < from + LINE; ++i)
      broken |= Bits((one[i] & EXPONENT) == EXPONENT) | Bits((two[i] & EXPONENT) == EXPONENT) |
                Bits((three[i] & EXPONENT) == EXPONENT) | Bits((four[i] & EXPONENT) == EXPONENT);
  }
  for (const Bits* rest = four + quarter; rest < (const Bits*)data + end; ++rest)
    broken |= Bits((*rest & EXPONENT) == EXPONENT);
  return !broken;
}

}  // namespace

extern "C" {

// 1 if the gradients of all tensors are finite.
int64_t gradients_are_finite(const Tensor* tensors, int64_t count, int64_t threads) {
  std::vector<Piece> pieces;
  for (int64_t k = 0; k < count; ++k)
    if (tensors[k].grad)
      for (int64_t from = 0; from < tensors[k].numel; from += CHECKED)
        pieces.push_back({0, k, from, from + CHECKED < tensors[k].numel ? from + CHECKED : tensors[k].numel, {}});
  std::atomic<bool> finite{true};
  in_parallel(pieces.size(), threads, [&](int64_t i) {
    // from the last to the first: what was read last is still in the cache when the step begins with the first
    const Piece& p = pieces[pieces.size() - 1 - i];
    const Tensor& t = tensors[p.tensor];
    bool good = t.dtype == FLOAT    ? all_finite<uint32_t, 0x7f800000u>(t.grad, p.begin, p.end)
                : t.dtype == DOUBLE ? all_finite<uint64_t, 0x7ff0000000000000ull>(t.grad, p.begin, p.end)
                                    : all_finite<uint16_t, 0x7f80>(t.grad, p.begin, p.end);
    if (!good) finite = false;
  });
  return finite;
}

void split_lbi_step(const Group* groups, int64_t count, Tensor* tensors, int64_t threads) {
  std::vector<Piece> pieces;
  std::vector<std::vector<double>> squares;  // by tensor and unit
  for (int64_t k = 0; k < count; ++k) {
    const Group& g = groups[k];
    if (g.penalty) *g.step += 1;
    for (int64_t n = g.first; n < g.first + g.tensors; ++n) {
      const Tensor& t = tensors[n];
      if (t.grad && t.updates) *t.updates += 1;
      squares.emplace_back(g.penalty == GROUP ? g.units : 0, 0.0);
      // a piece is so many units, rows or entries, whatever lies one after the other
      const bool units = g.penalty == GROUP && t.outer == 1, rows = g.penalty == GROUP && !units;
      const int64_t all = units ? t.units : rows ? t.outer : t.numel;
      const int64_t each = units ? t.run : rows ? t.units * t.run : 1;
      int64_t chunk = each > 0 && each < PIECE ? PIECE / each : 1;
      if (rows && chunk < (all + MOST_PIECES - 1) / MOST_PIECES) chunk = (all + MOST_PIECES - 1) / MOST_PIECES;
      for (int64_t from = 0; from < all; from += chunk)
        pieces.push_back({k, n, from, from + chunk < all ? from + chunk : all, std::vector<double>(rows ? g.units : 0)});
    }
  }
  in_parallel(pieces.size(), threads, [&](int64_t i) {
    Piece& p = pieces[i];
    const Group& g = groups[p.group];
    const Tensor& t = tensors[p.tensor];
    double* sums = squares[p.tensor].data();
    if (t.dtype == FLOAT) run_base<float, float>(g, t, p, sums);
    else if (t.dtype == DOUBLE) run_base<double, double>(g, t, p, sums);
    else run_base<bfloat16, float>(g, t, p, sums);
  });
  for (const Piece& p : pieces)
    for (size_t unit = 0; unit < p.squares.size(); ++unit) squares[p.tensor][unit] += p.squares[unit];
  for (int64_t k = 0; k < count; ++k) {
    const Group& g = groups[k];
    if (g.penalty != GROUP) continue;
    std::vector<double> total(g.units, 0.0);
    for (int64_t n = g.first; n < g.first + g.tensors; ++n)
      for (int64_t unit = 0; unit < g.units; ++unit)
        total[unit] += tensors[n].scale * tensors[n].scale * squares[n][unit];
    g.wide ? record<double>(g, total) : record<float>(g, total);
  }
}

}
