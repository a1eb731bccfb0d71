"""The verdict on one array: does every element lie within its allowed error of the reference."""

from typing import NamedTuple

import numpy as np


class Verdict(NamedTuple):
    name: str
    conforms: bool
    problem: str = ""  # in words, where there are no numbers to compare
    index: tuple = ()  # of the worst element, the one with the largest ratio
    expected: float = 0.0  # there
    got: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    ratio: float = 0.0  # error / allowed
    outside: int = 0  # how many elements are
    size: int = 0
    example: str = ""  # the call, in words

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


def compare(expected, got, allowed, *, name="out", dtype=None):
    """Compare element by element. NaN and inf pass only where the reference says the same.

    `allowed` is an array like `expected`, or a number. With a `dtype`, `got` must be an array of that dtype.
    """
    expected = np.asarray(expected)
    if got is None:
        return Verdict(name, False, "nothing came back")
    if not isinstance(got, (np.ndarray, np.generic)):
        return Verdict(name, False, f"is a {type(got).__name__}, expected an array")
    if got.shape != expected.shape:
        return Verdict(name, False, f"has shape {got.shape}, expected {expected.shape}")
    if dtype is not None and got.dtype != dtype:
        return Verdict(name, False, f"has dtype {got.dtype}, expected {np.dtype(dtype)}")
    if got.dtype.kind not in "fc":
        return Verdict(name, False, f"has dtype {got.dtype}, expected floating point")
    if not expected.size:
        return Verdict(name, True)
    got, allowed = got.astype(np.result_type(got, expected)), np.broadcast_to(allowed, expected.shape)
    with np.errstate(all="ignore"):
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        error = np.where(same, 0, np.abs(got - expected))
        ratio = np.where(same, 0, error / allowed)  # inf where nothing is allowed
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    inside = same | (error <= allowed)  # false for NaN
    worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Verdict(
        name,
        conforms=bool(inside.all()),
        index=tuple(map(int, worst)),
        expected=expected[worst].item(),
        got=got[worst].item(),
        error=error[worst].item(),
        allowed=allowed[worst].item(),
        ratio=ratio[worst].item(),
        outside=int((~inside).sum()),
        size=expected.size,
    )
