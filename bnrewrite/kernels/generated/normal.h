// The normal distribution, of vectors and of numbers.

namespace {

// Its distribution function: the smaller tail, from the series of
// (x + MIDDLE) e^(x^2) erfc(x) in t = (x - MIDDLE) / (x + MIDDLE), its even and odd terms side by
// side.
template <class V>
inline V normal(V z) {
  constexpr acc most = 40; // where it is one or zero
  V x = (z < acc(0) ? -z : z) * acc(0.707106781186547524400844362L);
  x = x > most ? V{} + most : x;
  const V inverse = acc(1) / (x + MIDDLE), t = (x - MIDDLE) * inverse, square = t * t;
  V even{}, odd{};
  for (int k = int(std::size(SERIES)) - 2; k >= 0; k -= 2) {
    even = even * square + SERIES[k];
    odd = odd * square + SERIES[k + 1];
  }
  const V tail = (even + odd * t) * inverse * exponential(V(acc(-0.5) * (z * z))) * acc(0.5);
  return z < acc(0) ? tail : acc(1) - tail;
}

} // namespace
