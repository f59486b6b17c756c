// Vectors of numbers, loads and stores of every dtype, and moments that are merged.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64; // bytes
#elif defined(__AVX__)
constexpr int64_t REGISTER = 32;
#else
constexpr int64_t REGISTER = 16;
#endif

// Numbers in a vector. Of longer ones a compiler keeps parts in memory, which takes ten times as long.
constexpr int64_t W = REGISTER / sizeof(acc);

constexpr int64_t LINE = 64;      // bytes of a cache
constexpr int64_t BLOCK = 64 * W; // numbers that are added up in single precision
constexpr int64_t ROWS = 64;      // rows of columns that are
constexpr int64_t MOST = 256;     // the same, where it takes long to merge them
constexpr int64_t TALL = 8;       // rows that are read at once
constexpr int64_t AHEAD = 4;      // steps of such rows between what is read and what is asked for
constexpr int64_t NEAR = 128;     // numbers of a row between the two, where there are no such rows
constexpr int64_t FAR = 2048;     // the same of rows that are no columns

// The fewest columns that are whole groups and fill vectors; if these are many, whole groups.
inline int64_t filled_by(int64_t group) {
  const int64_t filled = group * (W / std::min(W, group & -group)); // the least multiple of both
  return filled > 256 ? group : filled;
}

typedef acc vec __attribute__((vector_size(REGISTER)));
typedef uint16_t half_bits __attribute__((vector_size(W * 2)));
typedef uint32_t word_bits __attribute__((vector_size(W * 4)));
typedef float floats __attribute__((vector_size(W * 4)));

struct bfloat16 {
  uint16_t bits;
};
#ifdef __aarch64__
typedef __fp16 float16; // the other name only from GCC 13 on
#else
typedef _Float16 float16;
#endif

// A compiler converts vectors of halves one by one, which takes eight times as long (GCC 12).
#ifdef __AVX512F__
constexpr bool HALVES = std::is_same_v<acc, float>;
typedef __m512 singles;

inline singles widen(const float16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((__m256i *)p)); }

inline void narrow(float16 *p, singles value) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
constexpr bool HALVES = std::is_same_v<acc, float>;
typedef __m256 singles;

inline singles widen(const float16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((__m128i *)p)); }

inline void narrow(float16 *p, singles value) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
constexpr bool HALVES = std::is_same_v<acc, float>;
typedef float32x4_t singles;

inline singles widen(const float16 *p) { return vcvt_f32_f16(vld1_f16(p)); }

inline void narrow(float16 *p, singles value) { vst1_f16(p, vcvt_f16_f32(value)); }
#else
constexpr bool HALVES = false;
typedef floats singles;
inline singles widen(const float16 *) { return singles{}; }
inline void narrow(float16 *, singles) {}
#endif

template <class V, class T>
inline V load(const T *p) {
  if constexpr (std::is_same_v<V, vec>) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      half_bits half;
      std::memcpy(&half, p, sizeof half);
      word_bits word = __builtin_convertvector(half, word_bits) << 16;
      floats value;
      std::memcpy(&value, &word, sizeof value);
      return __builtin_convertvector(value, vec);
    } else if constexpr (HALVES && std::is_same_v<T, float16>) {
      singles half = widen(p);
      vec value;
      std::memcpy(&value, &half, sizeof value);
      return value;
    } else {
      typedef T values __attribute__((vector_size(W * sizeof(T))));
      values value;
      std::memcpy(&value, p, sizeof value);
      return __builtin_convertvector(value, vec);
    }
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    uint32_t word = uint32_t(p->bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return V(value);
  } else {
    return V(*p);
  }
}

template <class T, class V>
inline void store(T *p, V value) {
  if constexpr (std::is_same_v<V, vec>) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      floats single = __builtin_convertvector(value, floats);
      word_bits word;
      std::memcpy(&word, &single, sizeof word);
      word_bits rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
      rounded = (word & 0x7fffffff) > 0x7f800000 ? (word >> 16) | 0x40 : rounded;
      half_bits half = __builtin_convertvector(rounded, half_bits);
      std::memcpy(p, &half, sizeof half);
    } else if constexpr (HALVES && std::is_same_v<T, float16>) {
      singles single;
      std::memcpy(&single, &value, sizeof single);
      narrow(p, single);
    } else {
      typedef T values __attribute__((vector_size(W * sizeof(T))));
      values result = __builtin_convertvector(value, values);
      std::memcpy(p, &result, sizeof result);
    }
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    float single = float(value);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    bool nan = (word & 0x7fffffff) > 0x7f800000;
    p->bits = uint16_t(nan ? (word >> 16) | 0x40 : (word + 0x7fff + ((word >> 16) & 1)) >> 16);
  } else {
    *p = T(value);
  }
}

// Single numbers are added up one after the other, with more digits than they have themselves.
typedef std::conditional_t<std::is_same_v<acc, double>, long double, double> finer;

// The sum of the lanes and a rest, in double precision.
inline double total(vec lanes, finer rest) {
  typedef acc half __attribute__((vector_size(REGISTER / 2)));
  typedef double wide __attribute__((vector_size(W / 2 * sizeof(double))));
  half halves[2];
  std::memcpy(halves, &lanes, sizeof lanes);
  const wide sums = __builtin_convertvector(halves[0], wide) + __builtin_convertvector(halves[1], wide);
  double parts[W / 2];
  std::memcpy(parts, &sums, sizeof sums);
  for (int64_t n = W / 4; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) parts[i] += parts[i + n];
  return double(parts[0] + rest);
}

// Asks for what is read a while later, for the second cache: the first one is small, and gives up
// what it was asked for before it is read.
template <class T>
inline void fetch(const T *p) { __builtin_prefetch(p, 0, 2); }
template <class T>
inline void fetch_to_write(const T *p) { __builtin_prefetch(p, 1, 2); }

// Asks for large pages for a result that is written next. What is larger than this, the C library
// may have given back to the system, and to be given it anew in pages of 4 KiB takes longer than to
// write the numbers.
constexpr uintptr_t MANY = uintptr_t(2) << 20;

template <class T>
inline void in_large_pages(T *result, int64_t size) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (uintptr_t(result) + page - 1) / page * page;
  const uintptr_t end = uintptr_t(result + size) / page * page;
  if (result != nullptr && begin + MANY < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Results that are larger than this are written past the caches, which else would read each line
// before it is overwritten. Lines are written whole: rows of `dense` numbers have to begin with one.
constexpr int64_t PAST = int64_t(8) << 20; // bytes

template <class T>
inline bool goes_past(const T *result, int64_t size, int64_t dense) {
  return size * int64_t(sizeof(T)) > PAST && dense * sizeof(T) % LINE == 0 && result != nullptr;
}

template <class T, class V>
inline void store(T *p, V value, bool past) {
#ifdef __AVX__
  if constexpr (std::is_same_v<V, vec> && std::is_same_v<T, acc>) {
    if (past && uintptr_t(p) % sizeof value == 0) {
      __m256i parts[sizeof value / sizeof(__m256i)];
      std::memcpy(parts, &value, sizeof value);
      for (auto &part : parts) _mm256_stream_si256((__m256i *)p + (&part - parts), part);
      return;
    }
  }
#endif
  store(p, value);
}

// At the end of a function: what its threads wrote past the caches is there for all to read.
struct Settled {
  int64_t threads;
  bool past;
  ~Settled() {
#ifdef __AVX__
    if (!past) return;
#pragma omp parallel num_threads(threads) if (threads > 1)
    _mm_sfence();
#endif
  }
};

// A vector may reach back from the end: only its last lanes are new.
typedef std::conditional_t<std::is_same_v<acc, double>, int64_t, int32_t> lane;
typedef lane lane_numbers __attribute__((vector_size(W * sizeof(lane))));

template <int slot>
struct Whole {};
struct Last {
  lane_numbers is_new;
};

template <lane... numbers>
constexpr lane_numbers in_order(std::integer_sequence<lane, numbers...>) {
  return lane_numbers{numbers...};
}

inline Last last(int64_t count) {
  constexpr lane_numbers order = in_order(std::make_integer_sequence<lane, W>{});
  return {order >= lane(W - count)};
}

// The numbers up to `end`, a vector at a time, or one by one where there are fewer than one has.
// The vector that reaches back comes first: none then reads what another has just written in part.
template <class Body>
inline void each(int64_t end, Body body) {
  const int64_t whole = end / W * W;
  if (whole > 0) {
    if (whole < end) body(vec{}, end - W, last(end - whole));
    for (int64_t j = 0; j < whole; j += W) body(vec{}, j, Whole<0>{});
  } else {
    for (int64_t j = 0; j < end; ++j) body(acc{}, j, Whole<0>{});
  }
}

// The same for sums: SLOTS of them grow side by side, as one alone would wait for each addition.
// The last vector may reach back from where the sums begin.
constexpr int SLOTS = 4;
typedef vec slots[SLOTS];

template <class Body>
inline void each_summed(int64_t begin, int64_t end, Body body) {
  int64_t j = begin;
  for (; j + SLOTS * W <= end; j += SLOTS * W) {
    body(vec{}, j, Whole<0>{});
    body(vec{}, j + W, Whole<1>{});
    body(vec{}, j + 2 * W, Whole<2>{});
    body(vec{}, j + 3 * W, Whole<3>{});
  }
  for (; j + W <= end; j += W) body(vec{}, j, Whole<0>{});
  if (j < end && end >= W) body(vec{}, end - W, last(end - j)), j = end;
  for (; j < end; ++j) body(acc{}, j, Whole<0>{});
}

// What is new of a value; the rest is zero.
template <class V, int slot>
inline V fresh(V value, Whole<slot>) { return value; }
inline vec fresh(vec value, Last last) { return last.is_new ? value : vec{}; }

// Stores what is new of a value; the rest stays, as it may be made of what was there before.
template <class T, class V, int slot>
inline void store_fresh(T *p, V value, Whole<slot>, bool past) { store(p, value, past); }
template <class T>
inline void store_fresh(T *p, vec value, Last last, bool) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<acc, float>) {
    const auto lanes = (__m512i)last.is_new;
    _mm512_mask_storeu_ps(p, _mm512_test_epi32_mask(lanes, lanes), (__m512)value);
    return;
  }
#endif
  store(p, vec(last.is_new ? value : load<vec>(p)));
}

// Adds a number or vector to a sum; single numbers may be many, where rows are short.
template <class V, int slot>
inline void add(slots &lanes, finer &rest, V value, Whole<slot>) {
  if constexpr (std::is_same_v<V, vec>) lanes[slot] += value;
  else rest += value;
}
inline void add(slots &lanes, finer &, vec value, Last last) { lanes[1] += fresh(value, last); }

inline double total(const slots &lanes, finer rest) {
  return total((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]), rest);
}

inline void clear(slots &lanes, finer &rest) {
  for (int i = 0; i < SLOTS; ++i) lanes[i] = vec{};
  rest = 0;
}

// What is subtracted before sums are taken: inf would make NaN of every number.
inline acc pivot_at(double mean) {
  return std::isfinite(acc(mean)) ? acc(mean) : acc(0);
}

// The mean of two parts that are `distance` apart, the second one of which has this share; an
// infinite one stays infinite.
inline double between(double mean, double block, double distance, double share) {
  return std::isfinite(distance) ? mean + distance * share : mean * (1 - share) + block * share;
}

// Adds the moments of a block, which are sums of d = x - pivot, to those of a group.
inline void merge(double &count, double &mean, double &spread, double n, double pivot, double sum,
                  double squares) {
  double block = pivot + sum / n;
  double distance = block - mean;
  double both = count + n;
  mean = between(mean, block, distance, n / both);
  spread += (squares - sum * (sum / n)) + distance * distance * (count * (n / both));
  count = both;
}

// What is left of a number where its single precision is subtracted.
inline acc rounded_off(double value) {
  return std::isfinite(acc(value)) ? acc(value - double(acc(value))) : acc(0);
}

inline double larger(double a, double bound) { return a < bound ? bound : a; }
inline double at_least(double a, double bound) { return a >= bound ? 1.0 : 0.0; }
inline double inverse_root(double a) { return a == 0 ? 0.0 : 1 / std::sqrt(a); }

} // namespace
