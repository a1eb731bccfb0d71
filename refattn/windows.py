"""Windows that slide over space, in any number of dimensions: what convolution and pooling share.

The window of output position t sees, with kernel position k, the pixel  stride t + dilation k - padding.
"""

import itertools
from typing import NamedTuple

import numpy as np

from refattn.core import expect


class Windows(NamedTuple):
    """One length per axis of space in every field."""

    space: tuple
    kernel: tuple
    stride: tuple
    padding: tuple
    dilation: tuple

    @property
    def output(self):
        """How many windows fit: floor((space + 2 padding - dilation (kernel - 1) - 1) / stride) + 1."""
        return tuple((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in zip(*self))

    @property
    def pointwise(self):
        """Every window is one pixel, and every pixel a window."""
        return max(self.kernel + self.stride, default=1) == 1 and not any(self.padding)


def windows(where, space, kernel, stride, padding, dilation=1):
    """Windows from options, each one number for all axes or a tuple of one per axis; `where` begins the errors."""
    axes = len(space)
    checked = Windows(
        tuple(space),
        per_axis(f"{where}: kernel", kernel, axes, 1),
        per_axis(f"{where}: stride", stride, axes, 1),
        per_axis(f"{where}: padding", padding, axes, 0),
        per_axis(f"{where}: dilation", dilation, axes, 1),
    )
    fits = f"one that fits into the space of x, {checked.space} and padding {checked.padding}"
    expect(all(t > 0 for t in checked.output), f"{where}: kernel", checked.kernel, fits)
    return checked


def per_axis(what, value, axes, least):
    """The option as a tuple of one int per axis."""
    values = value if isinstance(value, tuple) else (value,) * axes
    fits = len(values) == axes and all(isinstance(v, (int, np.integer)) and v >= least for v in values)
    expect(fits, what, value, f"an int of at least {least}, or a tuple of {axes} of them")
    return values


def taps(windows):
    """For every kernel position, in C order: the index, in padded space, of the pixels it sees from all windows."""
    for along in itertools.product(*_slices(windows)):
        yield (..., *along)


def taps_by_axis(windows):
    """For every axis of space: the taps of a kernel that is one position long along the others.

    Whatever treats all positions of the kernel alike can go through the axes one after the other, in fewer steps.
    """
    for axis, along in enumerate(_slices(windows)):
        after = (slice(None),) * (len(windows.space) - axis - 1)
        yield [(..., tap, *after) for tap in along]


def _slices(windows):
    """For every axis of space, for every kernel position along it: the pixels it sees from all windows."""
    for n, step, d, t in zip(windows.kernel, windows.stride, windows.dilation, windows.output):
        yield [slice(d * k, d * k + step * (t - 1) + 1, step) for k in range(n)]


def pixels_seen(windows):
    """How many pixels each window sees that are not padding, of shape (*T,)."""
    seen = np.ones((), int)
    for s, k, step, p, d, t in zip(*windows, windows.output):
        position = step * np.arange(t)[:, None] + d * np.arange(k) - p
        seen = seen[..., None] * ((position >= 0) & (position < s)).sum(axis=1)
    return seen


def pad(x, windows, value=0.0):
    """x, whose last axes are space, with `value` around it."""
    if not any(windows.padding):
        return x
    padded = np.full_like(x, value, order="C", shape=(*x.shape[: -len(windows.space)], *padded_space(windows)))
    padded[inside(windows)] = x
    return padded


def padded_space(windows):
    return tuple(s + 2 * p for s, p in zip(windows.space, windows.padding))


def inside(windows):
    """The index of space in padded space."""
    return (..., *(slice(p, p + s) for s, p in zip(windows.space, windows.padding)))


def bins(space, size):
    """The index of every output position of adaptive pooling, and of the pixels in its bin."""
    for t in np.ndindex(*size):
        yield (..., *t), (..., *(slice(i * s // n, -(-(i + 1) * s // n)) for i, s, n in zip(t, space, size)))
