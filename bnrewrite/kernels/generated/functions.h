// Exponentials and what is made of them, of vectors and of numbers, by their series.

namespace {

template <class V>
struct whole; // integers as wide as the numbers
template <>
struct whole<acc> {
  typedef std::conditional_t<sizeof(acc) == 4, int32_t, int64_t> type;
};
template <>
struct whole<vec> {
  typedef whole<acc>::type type __attribute__((vector_size(sizeof(vec))));
};

constexpr int DIGITS = sizeof(acc) == 4 ? 23 : 52;
constexpr int BIAS = sizeof(acc) == 4 ? 127 : 1023;
constexpr int TERMS = sizeof(acc) == 4 ? 7 : 13; // (ln 2 / 2)^(TERMS + 1) / (TERMS + 1)! < 2^-DIGITS

template <class V>
inline V power_of_two(typename whole<V>::type n) {
  const typename whole<V>::type bits = (n + BIAS) << DIGITS;
  V value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// e^r - 1 and n, for x = n ln 2 + r with |r| <= ln 2 / 2.
template <class V>
inline V reduced(V x, typename whole<V>::type &n) {
  constexpr acc magic = acc(1.5) * acc(int64_t(1) << DIGITS); // behind it there are whole numbers
  constexpr acc high = sizeof(acc) == 4 ? acc(0.693359375) : acc(0x1.62e42feep-1);
  constexpr acc low = acc(0.693147180559945309417232121458L - (long double)(high));
  const V near = x * acc(1.442695040888963407359924681L) + magic;
  typename whole<V>::type bits, zero;
  const V origin = V{} + magic, count = near - magic;
  std::memcpy(&bits, &near, sizeof bits);
  std::memcpy(&zero, &origin, sizeof zero);
  n = bits - zero;
  const V r = (x - count * high) - count * low;
  V sum = V{} + acc(1);
  for (int k = TERMS; k > 1; --k) sum = sum * (r * (acc(1) / acc(k))) + acc(1);
  return sum * r;
}

template <class V>
inline V exponential(V x) {
  constexpr acc least = sizeof(acc) == 4 ? -104 : -746, most = sizeof(acc) == 4 ? 89 : 710;
  x = x < least ? V{} + least : x > most ? V{} + most : x;
  typename whole<V>::type n;
  const V rest = reduced(x, n);
  const auto half = n >> 1;
  return (rest + acc(1)) * power_of_two<V>(half) * power_of_two<V>(n - half);
}

template <class V>
inline V bounded(V x) {
  return x < -FAR_OUT ? V{} - FAR_OUT : x > FAR_OUT ? V{} + FAR_OUT : x;
}

template <class V>
inline V logistic(V x) {
  const V small = exponential(V(x < acc(0) ? x : -x)), one = V{} + acc(1);
  return (x < acc(0) ? small : one) / (small + acc(1));
}

template <class V>
inline V logistic_slope(V x) {
  const V small = exponential(V(x < acc(0) ? x : -x)), inverse = acc(1) / (small + acc(1));
  return small * inverse * inverse;
}

template <class V>
inline V hyperbolic_tangent(V x) {
  constexpr acc most = 20; // where it is one
  x = x < -most ? V{} - most : x > most ? V{} + most : x;
  typename whole<V>::type n;
  const V rest = reduced(V(x + x), n), scale = power_of_two<V>(n);
  const V less_one = rest * scale + (scale - acc(1));
  return less_one / (less_one + acc(2));
}

} // namespace
