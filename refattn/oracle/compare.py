"""The verdict on one array: does every element lie within its bound of the reference.

    CONFORMS             every element is inside
    BUG                  one is outside the worst case: nothing that the arithmetic allows puts it there
    BUG p < 1e-6         one is outside what chance makes of rounding, on inputs that refattn drew
    SUSPECT              no element is outside, but all together they are off to one side, or by more than predicted
    OUTSIDE THE MODEL    nothing is predicted there, for example where float16 scores overflow: neither a pass nor a bug
"""

import math
from typing import Any, NamedTuple

import numpy as np

from refattn.oracle.arithmetic import FORMATS

CONFORMS, OUTSIDE, SUSPECT = "CONFORMS", "OUTSIDE THE MODEL", "SUSPECT"
BUG, LIKELY = "BUG", "BUG p < 1e-6"
SEVERITY = CONFORMS, OUTSIDE, SUSPECT, LIKELY, BUG  # from the best to the worst

# Found on kernels that are right, with room: the largest there were 4.1 for `out`, 10 for gradients (whose errors hang
# together within a row), and 5.6 along a direction; the mean square was 1 where only the result is rounded.
GAIN = {"out": 6.0, "lse": 6.0}
GAIN_OF_GRADIENT, ALONG = 12.0, 8.0
ENOUGH = 64  # elements, to judge them together


class Bound(NamedTuple):
    """Arrays like the value they belong to, or None."""

    worst: Any = None  # no arithmetic of the model is off by more
    stat: Any = None  # nor is any by chance, once in a million tensors
    sd: Any = None  # one standard deviation

    @property
    def least(self):
        """The strictest there is."""
        return self.worst if self.stat is None else self.stat


class Verdict(NamedTuple):
    name: str
    kind: str
    problem: str = ""  # in words, where there are no numbers to compare, or where all together are suspect
    index: tuple = ()  # of the worst element, the one with the largest ratio
    expected: float = 0.0  # there
    got: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    ratio: float = 0.0  # error / allowed
    outside: int = 0  # how many elements are
    size: int = 0
    example: str = ""  # the call, in words

    @property
    def conforms(self):
        return self.kind == CONFORMS

    def __str__(self):
        if self.problem:
            return self.problem
        if not self.size:
            return "empty"
        story = (
            f"{self.got:.9g} at {list(self.index)}, expected {self.expected:.9g}: off by {self.error:.3g}, "
            f"{self.ratio:.3g} times the allowed {self.allowed:.3g}"
        )
        return story if self.conforms else f"{story}; {self.outside} of {self.size} elements outside"


def worse(verdict):
    """A key: the larger, the worse."""
    return SEVERITY.index(verdict.kind), bool(verdict.problem), verdict.ratio


def compare(expected, got, bound, *, name="out", dtype=None, example="", along=None, constants=0.0):
    """Compare element by element. NaN and inf pass only where the reference says the same.

    `bound` is a Bound, whose statistical part, if it has one, decides as well; or the worst case alone. With a `dtype`,
    `got` must be an array of it. `along` is {words: array like expected}, directions in which known mistakes push;
    `constants` is how far, relatively, the rounding of constants (a scale, a factor of dropout) may push all of them.
    """
    expected, bound = np.asarray(expected), bound if isinstance(bound, Bound) else Bound(bound)
    problem = _unfit(expected, got, dtype)
    if problem:
        return Verdict(name, BUG, problem, example=example)
    if not expected.size:
        return Verdict(name, CONFORMS, example=example)
    got = got.astype(np.result_type(expected, np.float64 if got.dtype.kind not in "fc" else got.dtype))
    with np.errstate(all="ignore"):
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        error = np.where(same, 0, np.abs(got - expected))
        allowed = np.broadcast_to(bound.least, expected.shape)
        ratio = np.where(same, 0, error / allowed)  # inf where nothing is allowed
    unknown = ~np.isfinite(allowed) & ~same  # nothing is predicted there
    ratio = np.where(unknown, 0, np.where(np.isnan(ratio), np.inf, ratio))
    outside = ~(same | unknown | (error <= allowed))  # true for NaN
    worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    kind, problem = CONFORMS, ""
    if outside.any():
        beyond = bound.worst is not None and not (same | unknown | (error <= bound.worst)).all()
        kind = BUG if beyond or not np.isfinite(error[outside]).all() else LIKELY
    elif unknown.any():
        kind, problem = OUTSIDE, f"nothing is predicted for {int(unknown.sum())} of {unknown.size} elements"
    elif bound.sd is not None:
        problem = _together(name, expected, got, bound.sd, along or {}, constants)
        kind = SUSPECT if problem else CONFORMS
    return Verdict(
        *(name, kind, problem, tuple(map(int, worst)), expected[worst].item(), got[worst].item()),
        *(error[worst].item(), allowed[worst].item(), ratio[worst].item(), int(outside.sum()), expected.size, example),
    )


def _unfit(expected, got, dtype):
    """Why nothing can be compared, or nothing."""
    if got is None:
        return "nothing came back"
    if not isinstance(got, (np.ndarray, np.generic)):
        return f"is a {type(got).__name__}, expected an array"
    if got.shape != expected.shape:
        return f"has shape {got.shape}, expected {expected.shape}"
    if dtype is not None and got.dtype != dtype:
        return f"has dtype {got.dtype}, expected {np.dtype(dtype)}"
    if got.dtype.kind not in "fc" and got.dtype.name not in FORMATS:
        return f"has dtype {got.dtype}, expected floating point"
    return ""


def _together(name, expected, got, sd, along, constants):
    """What is strange about all errors together, or nothing."""
    usable = np.isfinite(expected) & np.isfinite(got) & (sd > 0) & np.isfinite(sd)
    if usable.sum() < ENOUGH:
        return ""
    sd, value = sd[usable], expected[usable]
    r = (got[usable] - value) / sd
    tests = {"of size, by {:.2g} of the value": (value, GAIN.get(name, GAIN_OF_GRADIENT))}
    tests |= {words: (direction[usable], ALONG) for words, direction in along.items()}
    for words, (direction, most) in tests.items():
        c = direction / sd
        length = float(np.sum(c * c))
        if not length:
            continue
        by = float(np.sum(r * c)) / length
        t = by * math.sqrt(length)
        if not (abs(t) <= most or abs(by) <= constants):
            return f"all elements are off together, {words.format(by)}: {abs(t):.3g} standard deviations"
    square, most = float(np.mean(r * r)), 1 + 8 * math.sqrt(2 / r.size)
    if not square <= most:
        return f"the mean square of the errors is {square:.3g} times what is predicted, at most {most:.3g} by chance"
    return ""
