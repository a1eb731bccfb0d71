"""Derivatives from function values alone: what a hand-written backward is checked against."""

import numpy as np

from refattn.core import leaves, tree_map

TINY = 1e-200  # so small that its square is 0: there is no truncation error, and no real part moves, not even one at 0


def complex_step(function, args, tangents):
    """J v to the last bits: f(x + ihv) = f(x) + ih J v + O(h^2), and nothing is subtracted.

    The real part of no argument moves, so a ReLU or a max cannot be pushed over its kink.
    """
    moved = tree_map(lambda x, v: x + 1j * (TINY * v.astype(np.result_type(v, np.float64))), args, tangents)
    return tree_map(lambda y: np.imag(y) / TINY, function(*moved))


class Inconclusive(Exception):
    """Differences cannot judge here: a kink lies within a step, or the function is too curved."""


def central(function, args, tangents, step=1e-3):
    """J v from differences: needs no complex arithmetic, so it shares no weakness with complex_step.

    Five points, error O(step^4). Halving the step must change neither the slope (a kink inside a step changes
    it, and so does an exponential tail) nor the bend (a kink exactly here doubles it, though slopes agree);
    if one changes, Inconclusive is raised.
    """
    here = function(*args)

    def look(h):
        def value(t):
            return function(*tree_map(lambda x, v: x + t * h * v, args, tangents))

        at = {t: value(t) for t in (-2, -1, 1, 2)}
        slope = tree_map(lambda a, b, c, d: (a - 8 * b + 8 * c - d) / (12 * h), at[-2], at[-1], at[1], at[2])
        bend = tree_map(lambda a, b, c: (a - 2 * b + c) / h**2, at[-1], here, at[1])
        return slope, bend

    (slope, bend), (finer, finer_bend) = look(step), look(step / 2)
    size, steepness = largest(here), largest(finer)
    if (
        largest(tree_map(np.subtract, slope, finer)) > 1e-7 * steepness + 1e-11 * size
        or largest(tree_map(np.subtract, bend, finer_bend)) > 1e-2 * largest(finer_bend) + 1e-6 * (size + steepness)
    ):
        raise Inconclusive
    return finer


def largest(tree):
    """The largest absolute value in a tree; 0 for an empty one."""
    return max((np.abs(x).max(initial=0) for _, x in leaves(tree)), default=0)


def inner(a, b):
    """The sum over all leaves of <a, b>."""
    return sum(float(np.sum(x * y)) for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True))


def hessian_vector(forward, backward, args, dout, tangents):
    """H v of L = <dout, f(args)>: the complex step through a hand-written backward pass.

    `forward(*args)` returns (out, saved) and `backward(dout, saved)` one gradient per argument.
    """
    along = tree_map(lambda d: d + 0j, dout)
    return complex_step(lambda *moved: tuple(backward(along, forward(*moved)[1])), args, tangents)
