r"""Square root of a matrix, by a few steps of the Newton-Schulz iteration.

Paper: Li, Xie, Wang and Gao, "Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square
Root Normalization", CVPR 2018 (arXiv:1712.01034).

Shapes
    N matrices, C by C, positive definite or semidefinite; K iterations.

Forward, for one matrix
    t = trace s,   Y_0 = s / t,   Z_0 = I     the eigenvalues now lie in [0, 1], where the iteration converges
    T_k = (3 I - Z_k Y_k) / 2                 for k = 0 ... K - 1
    Y_k+1 = Y_k T_k,   Z_k+1 = T_k Z_k        towards the root of s / t, and its inverse
    r = sqrt(t) Y_K

Backward, with a bar for "gradient of the loss with respect to" and <.,.> the sum of products of entries
    Ybar_K = sqrt(t) rbar,   Zbar_K = 0
    Tbar_k = Y_k^T Ybar_k+1 + Zbar_k+1 Z_k^T                            for k = K - 1 ... 0
    Ybar_k = Ybar_k+1 T_k^T - Z_k^T Tbar_k / 2
    Zbar_k = T_k^T Zbar_k+1 - Tbar_k Y_k^T / 2
    tbar = <rbar, Y_K> / (2 sqrt(t)) - <Ybar_0, Y_0> / t                t scales the result, and divided s
    sbar = Ybar_0 / t + tbar I

Choices
    This is the derivative of the K steps, not of the exact root: at K = 5 the two differ visibly unless s is close to a
    multiple of I. It holds for any s; the authors' formulas, which are these for Y = Y^T and Z = Z^T, for symmetric s.
    K counts as the authors do: their first and last half-steps are the steps here with Z_0 = I, and without Z_K.
    K = 1 is refused, because their code forgets the factor Y_0 there.
    The trace must be positive. It is 0 for the covariance of a constant image, where the authors' code gives NaN.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Saved(NamedTuple):
    trace: Shaped[Array, "N 1 1"]
    steps: tuple  # of (Y_k, Z_k, T_k), each (N, C, C)
    y: Shaped[Array, "N C C"]  # Y_K


@shaped
def forward(s: Shaped[Array, "N C C"], *, iterations: int = 5) -> tuple[Shaped[Array, "N C C"], Saved]:
    expect(iterations >= 2, "matrix_sqrt.forward: iterations", iterations, "at least 2")
    trace = np.trace(s, axis1=1, axis2=2)
    expect((trace.real > 0).all(), "matrix_sqrt.forward: trace of s", trace, "positive numbers")
    trace = trace[:, None, None]
    identity = np.eye(s.shape[1], dtype=s.dtype)
    y, z, steps = s / trace, np.broadcast_to(identity, s.shape), []
    for _ in range(iterations):
        t = (3 * identity - z @ y) / 2
        steps.append((y, z, t))
        y, z = y @ t, t @ z
    return np.sqrt(trace) * y, Saved(trace, tuple(steps), y)


@shaped
def backward(dr: Shaped[Array, "N C C"], saved: Saved) -> tuple[Shaped[Array, "N C C"]]:
    trace, steps, root = saved
    dy, dz = np.sqrt(trace) * dr, np.zeros_like(root)
    for y, z, t in reversed(steps):
        y, z, t = (m.swapaxes(1, 2) for m in (y, z, t))
        dt = y @ dy + dz @ z
        dy, dz = dy @ t - z @ dt / 2, t @ dz - dt @ y / 2
    dtrace = _inner(dr, root) / (2 * np.sqrt(trace)) - _inner(dy, steps[0][0]) / trace
    return (dy / trace + dtrace * np.eye(dr.shape[1], dtype=dr.dtype),)


def _inner(a, b):
    return (a * b).sum(axis=(1, 2), keepdims=True)


def example(draw):
    n, c, rank = draw.size("N"), draw.size("C"), draw.size("rank")
    factor = draw.array(n, c, rank)
    s = factor @ factor.swapaxes(1, 2) + np.diag(np.arange(1, c + 1) / 8)
    if draw.choice("symmetric", True, False) is False:
        s = s * (1 - np.triu(np.ones((c, c)), 1) / 4)
    return Call((s,), {"iterations": draw.choice("iterations", 2, 3, 5)})


ABOUT = About(laws=("batch_independent",), witnesses=("authors' code", "definition", "relation"))
