"""Scalar functions, applied element by element. Real or complex in, same kind and precision out.

Every one is safe under the complex step: it branches on the real part and never takes an absolute value.
"""

import math

import numpy as np
from scipy.special import erfc

from refattn.core import DtypeError


def relu(x):
    """max(x, 0); its slope at 0 is 0, so `x.real > 0` is the factor of the backward pass. NaN stays NaN."""
    if np.iscomplexobj(x):  # of complex numbers np.maximum compares the imaginary parts too
        return np.where(x.real <= 0, 0, x)
    return np.maximum(x, 0)


def sigmoid(x):
    """1 / (1 + e^-x), without overflow at either end; the slope is s (1 - s)."""
    negative = (x.real < 0).astype(x.real.dtype)  # a factor: np.where is slow where signs change at random
    e = np.exp((2 * negative - 1) * x)  # |e| <= 1
    return (negative * e + (1 - negative)) / (1 + e)


def gelu(x):
    """x Phi(x), where Phi(x) = (1 + erf(x / sqrt 2)) / 2 is the normal distribution; the slope is gelu_slope."""
    return x * _normal(x)


def gelu_slope(x):
    """Phi(x) + x phi(x), with the density phi(x) = e^(-x^2 / 2) / sqrt(2 pi)."""
    return _normal(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _normal(x):
    """Phi(x) by erfc, which keeps its digits where Phi is small."""
    if x.dtype.char in "gG":
        raise DtypeError(
            f"elementwise.gelu: x has dtype {x.dtype} (longdouble), expected float32 or float64: "
            "SciPy has no erf of longer numbers; gelu_tanh takes all"
        )
    return erfc(-x / math.sqrt(2)) / 2


def gelu_tanh(x):
    """The approximation x/2 (1 + tanh u) = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * sigmoid(_twice_u(x))


def gelu_tanh_slope(x):
    """s + x s (1 - s) 2 u', with s = sigmoid(2 u), 1 - s = sigmoid(-2 u), u' = sqrt(2 / pi) (1 + 3 0.044715 x^2)."""
    s, one_minus_s = sigmoid(_twice_u(x)), sigmoid(-_twice_u(x))
    return s + x * s * one_minus_s * (math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x))


def _twice_u(x):
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)
