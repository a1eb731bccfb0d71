r"""How far a right answer may be from the reference: the allowed error, element by element, of any mechanism.

No tolerance is picked by hand. The reference itself is run again, forward and backward, as a sloppy machine would:
every argument and the result of every NumPy operation are off by a random amount, of the size that rounding in the
candidate's Arithmetic may cause, only SLOPPY times larger. What such runs do to an element is what rounding can do
to it.

    sd      = rms(y' - y) / SLOPPY                   y' one of RUNS noisy results
    allowed = FACTOR sd + half a unit in the last place of what is stored

Each operation is moved by a uniform error of at most
    u |v|          one rounding of the result v to the format of results; twice that for exp, tanh, ...; 2 u for erfc,
                   often written as 1 - erf
    u |v| + a sqrt(n (v^2 / 3 + q / 6) + q)    for a sum v of n terms t_i, q = sum t_i^2, in an order that the terms do
                   not know, a the unit roundoff of the accumulator
    the smallest normal number                 where v is not 0: results may underflow
so errors that cancel, grow in an iteration, or decide which way a ReLU goes are followed as they happen, not to first
order. An exact zero (behind a mask, say) stays one, and then the candidate's must be exact too.

What this is, and is not
    Rigorous: nothing but the last rounding. It is no worst case: rounding errors conspire in sums of equal terms.
    First order: nothing.
    Statistical: all of it. The candidate's errors are taken to be about as large as those of the reference's own
    operations would be; its algorithm may differ (blocks, another order, a recomputed softmax), and FACTOR is there
    for that and for the scatter of an rms over RUNS. tests/test_noise.py measures false alarms and what is seen.
    SLOPPY widens the gap in which a kink counts: where the candidate's rounding may fall on the other side, some of
    the noisy runs do.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import erfc

from refattn.core import tree_map
from refattn.oracle.arithmetic import half_ulp
from refattn.oracle.compare import Bound

SLOPPY = 8.0
FACTOR = 24.0
RUNS = 16


def granularity(arithmetic):
    """The formats of what an operation leaves behind, and of a sum before it is stored."""
    formats = [f for f in (arithmetic.scores, arithmetic.probs, arithmetic.softmax) if f is not None]
    return max(formats, key=lambda form: form.u), arithmetic.accumulator


def noise_bounds(value, expected, arithmetic, seed=0):
    """A Bound, without a worst case, for each array of the tree `expected`, when computed in `arithmetic`.

    `value(noisy)` computes `expected` again from noisy copies of its floating-point inputs; it makes such a copy of an
    array or a tree with the function `noisy` that it is given. `expected` is (out, gradients): they may be stored in
    different formats.
    """
    results, accumulator = granularity(arithmetic)
    total = tree_map(np.zeros_like, expected)
    for run in range(RUNS):
        noise = Noise(
            np.random.default_rng([seed, run]),
            *(SLOPPY * results.u, SLOPPY * accumulator.u, results.tiny, bool(run % 2)),
        )
        with np.errstate(all="ignore"):
            try:
                moved = value(lambda tree, noise=noise: tree_map(noise.start, tree))
            except ValueError:  # rounding may lead where the reference does not go: nothing is predicted
                moved = tree_map(lambda y: np.full_like(y, np.nan), expected)
            total = tree_map(lambda s, y, e: s + (np.asarray(y) - e) ** 2, total, moved, expected)

    def bound(form):
        def of(y, s):
            error = FACTOR / SLOPPY * np.sqrt(np.where(np.isnan(s) & np.isfinite(y), np.inf, s) / RUNS)
            size = np.where(np.isfinite(y), np.abs(y), 0)
            return Bound(None, error + half_ulp(size + error, form) * ((y != 0) | (error > 0)))

        return of

    (out, grads), (out_total, grads_total) = expected, total
    return (
        tree_map(bound(arithmetic.out), out, out_total),
        tree_map(bound(arithmetic.grad), grads, grads_total),
    )


def noise_bounds_of_call(mechanism, call, dout, expected, arithmetic, seed=0):
    """`noise_bounds` for a mechanism's (out, gradients); `expected` is (out, None) where dout is None."""

    def value(noisy):
        out, saved = mechanism.forward(*noisy(call.args), **{k: noisy(v) for k, v in call.options.items()})
        return out, None if dout is None else tuple(mechanism.backward(noisy(dout), saved))

    return noise_bounds(value, expected, arithmetic, seed)


# --- arithmetic that is off by a little ----------------------------------------------------------------------

BASIC = {np.add, np.subtract, np.multiply, np.divide, np.sqrt, np.square, np.reciprocal}  # rounded once
EXACT = {np.negative, np.positive, np.absolute, np.fabs, np.sign, np.maximum, np.minimum, np.fmax, np.fmin, np.copysign,
         np.floor, np.ceil, np.trunc, np.rint, np.conjugate, np.ldexp, np.nextafter}  # fmt: skip


class Noise(NamedTuple):
    rng: np.random.Generator
    unit: float  # relative size of one error
    acc: float  # and of one in a sum, before it is stored
    tiny: float  # absolute size of an underflow
    afresh: bool  # a sum that is used twice has another error each time: it might be computed again, in another way

    def start(self, x):
        """A noisy copy of an argument or a constant, if it is an array of real numbers."""
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        return self.add(x, self.acc * np.abs(x))

    def add(self, x, spread, remember=False):
        """x, each element moved by up to its spread, as an array that goes on being noisy."""
        error = self.rng.uniform(-1, 1, np.shape(x)) * (spread + self.tiny)
        moved = self.wrap(np.where(np.isfinite(error) & (x != 0), x + error, x))
        if remember and self.afresh:
            moved.exact = x, spread
        return moved

    def add_at(self, target, index, values):
        """np.add.at: sums that gather in one place."""
        n, squares = np.zeros_like(target), np.zeros_like(target)
        for sums, terms in ((target, values), (n, 1), (squares, values * values)):
            np.add.at(sums, index, terms)
        target[...] = _plain(self.add(target, self.of_sum(n, target, squares)))

    def of_sum(self, n, v, squares):
        """The error of a sum v of n terms, in random order, each partial sum rounded; `squares` is their sum."""
        return self.unit * np.abs(v) + self.acc * np.sqrt(n * (v * v / 3 + squares / 6) + squares)

    def wrap(self, x):
        if isinstance(x, tuple):
            return type(x)(map(self.wrap, x))
        if not isinstance(x, (np.ndarray, np.generic)) or x.dtype.kind != "f":
            return x
        x = np.asarray(x).view(Noisy)
        x.noise = self
        return x

    def use(self, x):
        """What an operation sees of an operand."""
        if isinstance(x, Noisy) and x.exact is not None:
            x = self.add(*x.exact)
        elif isinstance(x, np.ndarray) and not isinstance(x, Noisy) and x.ndim:
            x = self.start(x)  # a constant is rounded too
        return _plain(x)


class Noisy(np.ndarray):
    """An array whose arithmetic is noisy: a NumPy subclass, so that a mechanism runs on it unchanged."""

    def __array_finalize__(self, source):
        self.noise, self.exact = getattr(source, "noise", None), None

    def __setitem__(self, index, value):
        self.exact = None
        super().__setitem__(index, value)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        noise = next(x.noise for x in (*inputs, *(out or ())) if isinstance(x, Noisy))
        if method == "at" and ufunc is np.add:
            return noise.add_at(*map(_plain, inputs))
        exact = ufunc in EXACT or method == "at"
        operands = [_plain(x) if exact else noise.use(x) for x in inputs]
        target = {} if out is None else {"out": tuple(map(_plain, out))}
        result = getattr(ufunc, method)(*operands, **target, **kwargs)
        if out is not None and isinstance(out[0], Noisy):
            out[0].exact = None
        if exact or isinstance(result, tuple) or result.dtype.kind != "f":
            return noise.wrap(result) if out is None else out[0]
        spread = _growth(noise, ufunc, method, operands, kwargs, result)
        noisy = noise.add(result, spread, remember=ufunc is np.matmul or method == "reduce")
        if out is None:
            return noisy
        target["out"][0][...] = _plain(noisy)
        return out[0]

    def __array_function__(self, function, types, args, kwargs):
        if function not in PRODUCTS:
            return self.noise.wrap(super().__array_function__(function, types, args, kwargs))
        operands = [self.noise.use(x) for x in args]
        v = function(*operands, **kwargs)
        squares = function(*(x * x if isinstance(x, np.ndarray) else x for x in operands), **kwargs)
        return self.noise.add(v, self.noise.of_sum(PRODUCTS[function](*operands), v, squares), remember=True)


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, Noisy) else x


def _growth(noise, ufunc, method, inputs, kwargs, v):
    """The size of the error of an operation."""
    if ufunc is np.matmul:
        a, b = inputs
        axes = {k: x for k, x in kwargs.items() if k == "axes"}
        return noise.of_sum(a.shape[-1], v, np.matmul(a * a, b * b, **axes))
    if method in ("reduce", "accumulate", "reduceat"):
        terms, rest = inputs[0], inputs[1:]
        length = max(1, terms.size // max(1, np.size(v))) if method == "reduce" else max(terms.shape, default=1)
        if ufunc is not np.add:
            return noise.unit * length * np.abs(v)
        return noise.of_sum(length, v, getattr(ufunc, method)(terms * terms, *rest, **kwargs))
    if ufunc is erfc:
        return noise.unit * 2 * np.maximum(np.abs(v), 1)  # others write 1 - erf, and lose digits where it is small
    return noise.unit * np.abs(v) * (1 if ufunc in BASIC else 2)


def _summed(subscripts, *operands):
    """The number of terms in each sum of an einsum."""
    terms, _, kept = subscripts.replace(" ", "").partition("->")
    lengths = {}
    for term, x in zip(terms.split(","), operands):
        before, dots, after = term.partition("...")
        lengths |= dict(zip(before, x.shape)) | (dict(zip(after[::-1], x.shape[::-1])) if dots else {})
    return math.prod(n for letter, n in lengths.items() if letter not in kept)


PRODUCTS = {  # of two operands, linear in each: how many terms are summed
    np.einsum: _summed,
    np.dot: lambda a, b: a.shape[-1],
    np.inner: lambda a, b: a.shape[-1],
    np.tensordot: lambda a, b, axes=2: math.prod(a.shape[i] for i in np.arange(a.ndim)[_axes_of_first(axes)]),
}


def _axes_of_first(axes):
    return slice(-axes, None) if isinstance(axes, int) else axes[0]
