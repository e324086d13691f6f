// Number types, exp and the activations, written so that a loop over them vectorises: selects, no branches, no calls.
// Included by pointwise.inl, inside the namespace of a level.

struct bf16 {
  uint16_t bits;
};

template <class To, class From> RACECAR_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// The type that is computed in, and the way there and back.
template <class S> struct Storage {
  using T = S;
  static RACECAR_INLINE T load(S x) { return x; }
  static RACECAR_INLINE S store(T x) { return x; }
};

template <> struct Storage<bf16> {
  using T = float;
  static RACECAR_INLINE float load(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
  static RACECAR_INLINE bf16 store(float x) { // to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
  }
};

// x * y + z, in one rounding where the level has an instruction for it.
#if RACECAR_FMA
RACECAR_INLINE float muladd(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
RACECAR_INLINE double muladd(double x, double y, double z) { return __builtin_fma(x, y, z); }
#else
RACECAR_INLINE float muladd(float x, float y, float z) { return x * y + z; }
RACECAR_INLINE double muladd(double x, double y, double z) { return x * y + z; }
#endif

RACECAR_INLINE float absolute(float x) { return __builtin_fabsf(x); }
RACECAR_INLINE double absolute(double x) { return __builtin_fabs(x); }
RACECAR_INLINE float with_sign(float x, float of) { return __builtin_copysignf(x, of); }
RACECAR_INLINE double with_sign(double x, double of) { return __builtin_copysign(x, of); }

template <class T> struct Exp;

template <> struct Exp<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float rounder = 12582912.0f;   // 1.5 · 2^23: adding it rounds to an integer
  static constexpr float lowest = -87.33f;        // 2^n is still a normal number
  static constexpr float ln2_high = 0.693359375f; // few bits: its product with n is exact
  static constexpr float ln2_low = -2.12194440054690582692e-4f;
  // (e^r - 1 - r) / r²
  static RACECAR_INLINE float rest(float r) {
    float q = muladd(r, 1.0f / 5040, 1.0f / 720);
    q = muladd(q, r, 1.0f / 120);
    q = muladd(q, r, 1.0f / 24);
    q = muladd(q, r, 1.0f / 6);
    return muladd(q, r, 0.5f);
  }
};

template <> struct Exp<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double rounder = 6755399441055744.0; // 1.5 · 2^52
  static constexpr double lowest = -708.39;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static RACECAR_INLINE double rest(double r) {
    double q = muladd(r, 1.0 / 6227020800, 1.0 / 479001600);
    q = muladd(q, r, 1.0 / 39916800);
    q = muladd(q, r, 1.0 / 3628800);
    q = muladd(q, r, 1.0 / 362880);
    q = muladd(q, r, 1.0 / 40320);
    q = muladd(q, r, 1.0 / 5040);
    q = muladd(q, r, 1.0 / 720);
    q = muladd(q, r, 1.0 / 120);
    q = muladd(q, r, 1.0 / 24);
    q = muladd(q, r, 1.0 / 6);
    return muladd(q, r, 0.5);
  }
};

// For x <= 0: e^x = power · (1 + small) with power = 2^n and |ln(1 + small)| <= ln(2) / 2.
template <class T> struct ExpParts {
  T power, small;
};

template <class T> RACECAR_INLINE ExpParts<T> exp_parts(T x) {
  using E = Exp<T>;
  using Bits = typename E::Bits;
  const T at = x < E::lowest ? E::lowest : x; // NaN goes through
  const T shifted = muladd(at, static_cast<T>(1.44269504088896340736), E::rounder);
  const T n = shifted - E::rounder;
  const T r = muladd(n, -E::ln2_low, muladd(n, -E::ln2_high, at));
  const Bits exponent = (bit_cast<Bits>(shifted) + static_cast<Bits>(E::bias)) << E::mantissa;
  return {bit_cast<T>(exponent), muladd(r * r, E::rest(r), r)};
}

// e^x and e^x - 1 for x <= 0, to about 1 unit in the last place. Below the smallest normal number e^x is 0.
template <class T> RACECAR_INLINE T exp_of_negative(T x) {
  const ExpParts<T> e = exp_parts(x);
  return x < Exp<T>::lowest ? static_cast<T>(0) : muladd(e.power, e.small, e.power);
}

template <class T> RACECAR_INLINE T expm1_of_negative(T x) {
  const ExpParts<T> e = exp_parts(x);
  return muladd(e.power, e.small, e.power - 1);
}

// tanh(x) = x + x · numerator / denominator for |x| < 0.625, after Moshier's Cephes library; square is x².
RACECAR_INLINE float tanh_numerator(float square) {
  float q = muladd(square, -5.70498872745e-3f, 2.06390887954e-2f);
  q = muladd(q, square, -5.37397155531e-2f);
  q = muladd(q, square, 1.33314422036e-1f);
  return muladd(q, square, -3.33332819422e-1f) * square;
}
RACECAR_INLINE float tanh_denominator(float) { return 1; }
RACECAR_INLINE double tanh_numerator(double square) {
  const double q = muladd(square, -9.64399179425052238628e-1, -9.92877231001918586564e1);
  return muladd(q, square, -1.61468768441708447952e3) * square;
}
RACECAR_INLINE double tanh_denominator(double square) {
  const double q = muladd(square + 1.12811678491632931402e2, square, 2.23548839060100448583e3);
  return muladd(q, square, 4.84406305325125486048e3);
}

// Elsewhere 1 - 2 e^(-2|x|) / (1 + e^(-2|x|)). The two share their division.
template <class T> RACECAR_INLINE T tanh_of(T x) {
  const T size = absolute(x), square = x * x, e = exp_of_negative(-2 * size);
  const bool small = size < static_cast<T>(0.625);
  const T above_small = tanh_numerator(square), below_small = tanh_denominator(square);
  const T above_large = 2 * e, below_large = 1 + e;
  const T ratio = (small ? above_small : above_large) / (small ? below_small : below_large);
  const T if_small = muladd(x, ratio, x), if_large = with_sign(1 - ratio, x);
  return small ? if_small : if_large;
}

template <class T> struct Params {
  T p0, p1, p2;
};

// The parameters in the type that is computed in. A clamp's bounds are rounded as its results are, which the derivative
// compares with them.
template <class S, class T = typename Storage<S>::T> RACECAR_INLINE Params<T> rounded(Act act, const double *p) {
  using Store = Storage<S>;
  const Params<T> own = {static_cast<T>(p[0]), static_cast<T>(p[1]), static_cast<T>(p[2])};
  if (act != Act::clamp)
    return own;
  return {Store::load(Store::store(own.p0)), Store::load(Store::store(own.p1)), own.p2};
}

// The larger one, NaN if v is. One comparison for each choice: GCC takes a mask made of two apart, bit by bit.
template <class T> RACECAR_INLINE T larger(T v, T most) {
  const T larger = v > most ? v : most;
  return v != v ? v : larger;
}

// The number q where v is the larger one or NaN, else `place`.
template <class T> RACECAR_INLINE T place_of_larger(T v, T most, T q, T place) {
  const T larger = v > most ? q : place;
  return v != v ? q : larger;
}

template <Act act, class T> RACECAR_INLINE T activate(T u, Params<T> p) {
  if constexpr (act == Act::clamp) {
    const T above = u < p.p0 ? p.p0 : u;
    return above > p.p1 ? p.p1 : above;
  } else if constexpr (act == Act::leaky_relu) {
    const T scaled = u * p.p0;
    return u > 0 ? u : scaled;
  } else if constexpr (act == Act::elu) {
    const T inside = u * p.p2;
    const T negative = p.p0 * expm1_of_negative(inside < 0 ? inside : static_cast<T>(0));
    const T positive = u * p.p1;
    return u <= 0 ? negative : positive;
  } else if constexpr (act == Act::tanh) {
    return tanh_of(u);
  } else if constexpr (act == Act::sigmoid) {
    const T e = exp_of_negative(-absolute(u));
    return (u >= 0 ? static_cast<T>(1) : e) / (1 + e);
  } else if constexpr (act == Act::softsign) {
    return u / (1 + absolute(u));
  } else {
    return u;
  }
}

// g times the derivative, from the output a.
template <Act act, class T> RACECAR_INLINE T differentiate(T g, T a, Params<T> p) {
  if constexpr (act == Act::clamp) {
    const T above = a <= p.p0 ? static_cast<T>(0) : g;
    return a >= p.p1 ? static_cast<T>(0) : above;
  } else if constexpr (act == Act::leaky_relu) {
    const T scaled = g * p.p0;
    return a > 0 ? g : scaled;
  } else if constexpr (act == Act::elu) {
    const T negative = g * p.p2 * (a + p.p0), positive = g * p.p1;
    return a <= 0 ? negative : positive;
  } else if constexpr (act == Act::tanh) {
    return g * (1 - a * a);
  } else if constexpr (act == Act::sigmoid) {
    return g * (1 - a) * a;
  } else if constexpr (act == Act::softsign) {
    const T rest = 1 - absolute(a);
    return g * (rest * rest);
  } else {
    return g;
  }
}

template <Act value> struct Tag {
  static constexpr Act act = value;
};

// Calls f with the activation as a constant, so that the choice is made outside the loop.
template <class F> RACECAR_INLINE void with_constant(Act act, F f) {
  switch (act) {
  case Act::identity:
    return f(Tag<Act::identity>{});
  case Act::clamp:
    return f(Tag<Act::clamp>{});
  case Act::leaky_relu:
    return f(Tag<Act::leaky_relu>{});
  case Act::elu:
    return f(Tag<Act::elu>{});
  case Act::tanh:
    return f(Tag<Act::tanh>{});
  case Act::sigmoid:
    return f(Tag<Act::sigmoid>{});
  case Act::softsign:
    return f(Tag<Act::softsign>{});
  }
}
