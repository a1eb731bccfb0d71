r"""SimAM: attention without parameters.

Scale every entry by a gate that grows with its distance from the mean of its channel.

Paper: Yang, Zhang, Li and Xie, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
ICML 2021.

Shapes
    N images, C channels, H by W pixels; all is done channel by channel.

Forward
    d_ij = x_ij - 1/(HW) sum_ij x_ij
    v    = 1/n sum_ij d_ij^2                  n = HW - 1
    q    = 1 / (4 (v + lambda))
    e_ij = q d_ij^2 + 1/2                     one over the minimal energy of the neuron at i, j
    g_ij = sigmoid(e_ij)
    y_ij = g_ij x_ij

Backward, with a bar for "gradient of the loss with respect to"
    ebar_ij = ybar_ij x_ij g_ij (1 - g_ij)
    qbar    = sum_ij ebar_ij d_ij^2,   vbar = -4 q^2 qbar
    dbar_ij = 2 d_ij (q ebar_ij + vbar / n)   d enters e_ij, and v
    xbar_ij = ybar_ij g_ij + dbar_ij - mean dbar

Choices
    unbiased: v divides by HW - 1 in the authors' code (True), which needs more than one pixel, and by HW in the paper's
    equations (False). lambda is 1e-4 in both.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    d: Shaped[Array, "N C H W"]
    q: Shaped[Array, "N C 1 1"]
    gate: Shaped[Array, "N C H W"]
    n: int


@shaped
def forward(
    x: Shaped[Array, "N C H W"], *, lam: float = 1e-4, unbiased: bool = True
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    n = x.shape[2] * x.shape[3] - (1 if unbiased else 0)
    expect(n > 0, "simam.forward: x.shape", x.shape, "at least two pixels, or one with unbiased=False")
    expect(lam > 0, "simam.forward: lam", lam, "a positive number")
    d = x - x.mean(axis=(2, 3), keepdims=True)
    v = _sum(d, d) / n
    q = 1 / (4 * (v + lam))
    gate = 1 / (1 + np.exp(-0.5 - q * d * d))  # e is at least 1/2: nothing overflows
    return x * gate, Saved(x, d, q, gate, n)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"]]:
    x, d, q, gate, n = saved
    de = dy * x * gate * (1 - gate)
    dv = -4 * q * q * _sum(de * d, d)
    dd = 2 * d * (q * de + dv / n)
    return (dy * gate + dd - dd.mean(axis=(2, 3), keepdims=True),)


def _sum(a, b):
    """Over the pixels of a b: (N, C, 1, 1)."""
    return np.einsum("nchw,nchw->nc", a, b)[:, :, None, None]


def example(draw):
    unbiased = draw.choice("unbiased", True, False)
    x = draw.array(draw.size("N"), draw.size("C"), draw.size("H"), draw.size("W", low=2 if unbiased else 1))
    return Call((x,), {"unbiased": unbiased, "lam": draw.choice("lam", 1e-4, 0.1)})


ABOUT = About(
    weights="gate",
    laws=("batch_independent", "weights_in_unit_interval", "pixel_permutation_equivariant"),
    witnesses=("definition", "relation"),
)
