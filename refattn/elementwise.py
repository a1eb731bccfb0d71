"""Scalar functions, applied element by element. Real or complex in, same kind and precision out.

Every one is safe under the complex step: it branches on the real part and never takes an absolute value.
"""

import numpy as np


def relu(x):
    """max(x, 0); its slope at 0 is 0, so `x.real > 0` is the factor of the backward pass."""
    return np.where(x.real > 0, x, 0)


def sigmoid(x):
    """1 / (1 + e^-x), without overflow at either end; the slope is s (1 - s)."""
    e = np.exp(np.where(x.real < 0, x, -x))  # |e| <= 1
    return np.where(x.real < 0, e, 1) / (1 + e)
