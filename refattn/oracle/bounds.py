r"""How far a right answer may be from the reference: the allowed error, element by element, of any mechanism.

No tolerance is picked by hand. The reference itself is run again, forward and backward, as a sloppy machine would:
every argument and the result of every NumPy operation are off by a random amount, of the size that rounding to the
candidate's dtype may cause, only SLOPPY times larger. What such runs do to an element is what rounding can do to it.

    allowed = u |y| + FACTOR / SLOPPY rms(y' - y)        y' one of RUNS noisy results, u the unit roundoff

Each operation is moved by a uniform error of at most
    u |v|                                                       one rounding of the result v; 2 u |v| for exp, tanh, ...
    u sqrt(n (v^2 / 3 + q / 6) + q),  q = sum of (a_i b_i)^2    a sum of n terms a_i b_i, in an order unrelated to them
    the smallest normal number                                  where v is not 0: results may underflow
so errors that cancel, grow in an iteration, or decide which way a ReLU goes are followed as they happen, not to first
order. An exact zero (behind a mask, say) stays one, and then the candidate's must be exact too.

What this is, and is not
    Rigorous: nothing but the u |y|. It is no worst case: rounding errors conspire in sums of equal terms.
    First order: nothing.
    Statistical: all of it. The candidate's errors are taken to be about as large as those of the reference's own
    operations would be; its algorithm may differ (blocks, another order, a recomputed softmax), and FACTOR is there
    for that and for the scatter of an rms over RUNS. tests/test_bounds.py measures false alarms and what is seen.
    SLOPPY widens the gap in which a kink counts: where the candidate's rounding may fall on the other side, some of
    the noisy runs do.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import Call, tree_map

SLOPPY = 8.0
FACTOR = 16.0
RUNS = 24


def unit_roundoff(dtype):
    """u, half the gap between 1 and the next number."""
    return float(np.finfo(dtype).eps) / 2


def allowed(value, expected, dtype, seed=0):
    """The allowed error of each array of `expected`, when computed in `dtype`.

    `value(noisy)` computes `expected` (a tree) again from noisy copies of its floating-point inputs; it makes such
    a copy of an array or a tree with the function `noisy` that it is given.
    """
    u = unit_roundoff(dtype)
    total = tree_map(np.zeros_like, expected)
    for run in range(RUNS):
        noise = Noise(np.random.default_rng([seed, run]), SLOPPY * u, float(np.finfo(dtype).tiny))
        with np.errstate(all="ignore"):
            moved = value(lambda tree, noise=noise: tree_map(noise.start, tree))
            total = tree_map(lambda s, y, e: s + (np.asarray(y) - e) ** 2, total, moved, expected)
    return tree_map(lambda s, e: u * np.abs(e) + FACTOR / SLOPPY * np.sqrt(s / RUNS), total, expected)


def allowed_of_call(mechanism, call, dout, expected, dtype, seed=0):
    """`allowed` for a mechanism's (out, gradients); for out alone where dout is None, and `expected` is (out, None)."""

    def value(noisy):
        out, saved = mechanism.forward(*noisy(call.args), **{k: noisy(v) for k, v in call.options.items()})
        return out, None if dout is None else tuple(mechanism.backward(noisy(dout), saved))

    return allowed(value, expected, dtype, seed)


# --- arithmetic that is off by a little ----------------------------------------------------------------------

BASIC = {np.add, np.subtract, np.multiply, np.divide, np.sqrt, np.square, np.reciprocal}  # rounded once
EXACT = {np.negative, np.positive, np.absolute, np.fabs, np.sign, np.maximum, np.minimum, np.fmax, np.fmin, np.copysign,
         np.floor, np.ceil, np.trunc, np.rint, np.conjugate, np.ldexp, np.nextafter}  # fmt: skip


class Noise(NamedTuple):
    rng: np.random.Generator
    unit: float  # relative size of one error
    tiny: float  # absolute size of an underflow

    def start(self, x):
        """A noisy copy of an argument, if it is an array of real numbers."""
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        return self.add(x, self.unit * np.abs(x))

    def add(self, x, spread):
        """x, each element moved by up to its spread, as an array that goes on being noisy."""
        error = self.rng.uniform(-1, 1, np.shape(x)) * (spread + self.tiny)
        return self.wrap(np.where(x == 0, 0, x + np.where(np.isfinite(error), error, 0)))

    def wrap(self, x):
        if isinstance(x, tuple):
            return type(x)(map(self.wrap, x))
        if not isinstance(x, (np.ndarray, np.generic)) or x.dtype.kind != "f":
            return x
        x = np.asarray(x).view(Noisy)
        x.noise = self
        return x


class Noisy(np.ndarray):
    """An array whose arithmetic is noisy: a NumPy subclass, so that a mechanism runs on it unchanged."""

    def __array_finalize__(self, source):
        self.noise = getattr(source, "noise", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        noise, plain = self.noise, [_plain(x) for x in inputs]
        target = {} if out is None else {"out": tuple(map(_plain, out))}
        result = getattr(ufunc, method)(*plain, **target, **kwargs)
        if result is None or isinstance(result, tuple) or result.dtype.kind != "f" or ufunc in EXACT:
            return noise.wrap(result) if out is None else out[0]
        noisy = noise.add(result, noise.unit * _growth(ufunc, method, plain, kwargs, result))
        if out is None:
            return noisy
        target["out"][0][...] = _plain(noisy)
        return out[0]

    def __array_function__(self, function, types, args, kwargs):
        if function not in PRODUCTS:
            return self.noise.wrap(super().__array_function__(function, types, args, kwargs))
        plain = [_plain(x) for x in args]
        v = function(*plain, **kwargs)
        squares = function(*(x * x if isinstance(x, np.ndarray) else x for x in plain), **kwargs)
        return self.noise.add(v, self.noise.unit * _sum_of(PRODUCTS[function](*plain), v, squares))


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, Noisy) else x


def _growth(ufunc, method, inputs, kwargs, v):
    """The size of the error of an operation, in units of roundoff."""
    if ufunc is np.matmul:
        a, b = inputs
        return _sum_of(a.shape[-1], v, np.matmul(a * a, b * b, **{k: x for k, x in kwargs.items() if k == "axes"}))
    if method in ("reduce", "accumulate", "reduceat"):
        terms, rest = inputs[0], inputs[1:]
        length = max(1, terms.size // max(1, np.size(v))) if method == "reduce" else max(terms.shape, default=1)
        if ufunc is not np.add:
            return length * np.abs(v)
        return _sum_of(length, v, getattr(ufunc, method)(terms * terms, *rest, **kwargs))
    return np.abs(v) if ufunc in BASIC else 2 * np.abs(v)


def _sum_of(n, v, squares):
    """Of a sum v of n terms, in random order, each partial sum rounded; `squares` is the sum of the squared terms."""
    return np.sqrt(n * (v * v / 3 + squares / 6) + squares)


def _summed(subscripts, *operands):
    """The number of terms in each sum of an einsum."""
    terms, _, kept = subscripts.replace(" ", "").partition("->")
    lengths = {}
    for term, x in zip(terms.split(","), operands):
        before, dots, after = term.partition("...")
        lengths |= dict(zip(before, x.shape)) | (dict(zip(after[::-1], x.shape[::-1])) if dots else {})
    return math.prod(n for letter, n in lengths.items() if letter not in kept)


PRODUCTS = {np.einsum: _summed, np.dot: lambda a, b: a.shape[-1], np.inner: lambda a, b: a.shape[-1]}
