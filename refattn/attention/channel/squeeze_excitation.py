r"""Squeeze-and-Excitation.

Scale every channel by a gate computed from the global mean of all channels.

Paper: Hu, Shen and Sun, "Squeeze-and-Excitation Networks", CVPR 2018 (arXiv:1709.01507), section 3.

Shapes
    N images, C channels, H by W pixels, R = C / reduction hidden units.

Forward
    z_nc   = 1/(HW) sum_ij x_ncij             squeeze      (eq. 2)
    a_nr   = W1 z + b1,   h = max(a, 0)
    g_nc   = sigmoid(W2 h + b2)               excitation   (eq. 3)
    y_ncij = g_nc x_ncij                      scale        (eq. 4)

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nc   = sum_ij ybar_ncij x_ncij       y is linear in g
    ubar      = gbar g (1 - g)                u = W2 h + b2, and sigmoid' = g (1 - g)
    hbar      = ubar W2,   abar = hbar [a > 0]
    zbar      = abar W1
    xbar_ncij = ybar_ncij g_nc + zbar_nc / (HW)        x is used twice: scaled, and averaged

Choices
    b1 and b2: the paper's equations have none, the authors' release has both, many ports leave them out (None).
    The authors' residual networks add the shortcut in the same layer ("Axpy"), with a ReLU after it: two lines around
    this file, not part of it. relu'(0) = 0.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, shaped
from refattn.elementwise import relu, sigmoid


class Params(NamedTuple):
    w1: Shaped[Array, "R C"]
    w2: Shaped[Array, "C R"]
    b1: Shaped[Array, "R"] | None = None
    b2: Shaped[Array, "C"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    z: Shaped[Array, "N C"]
    h: Shaped[Array, "N R"]
    gate: Shaped[Array, "N C"]
    params: Params


def init(rng, channels, reduction=16, bias=True):
    """Normal weights of variance 1 / fan_in, zero biases."""
    hidden = max(channels // reduction, 1)
    return Params(
        w1=rng.normal(size=(hidden, channels)) / math.sqrt(channels),
        w2=rng.normal(size=(channels, hidden)) / math.sqrt(hidden),
        b1=np.zeros(hidden) if bias else None,
        b2=np.zeros(channels) if bias else None,
    )


@shaped
def forward(x: Shaped[Array, "N C H W"], params: Params) -> tuple[Shaped[Array, "N C H W"], Saved]:
    w1, w2, b1, b2 = params
    z = x.mean(axis=(2, 3))
    h = relu(z @ w1.T + (0 if b1 is None else b1))
    gate = sigmoid(h @ w2.T + (0 if b2 is None else b2))
    return x * gate[:, :, None, None], Saved(x, z, h, gate, params)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, z, h, gate, (w1, w2, b1, b2) = saved
    dgate = np.einsum("nchw,nchw->nc", dy, x)
    du = dgate * gate * (1 - gate)
    da = (du @ w2) * (h.real > 0)
    dz = da @ w1
    dx = dy * gate[:, :, None, None]
    dx += (dz / (x.shape[2] * x.shape[3]))[:, :, None, None]
    db1 = None if b1 is None else da.sum(axis=0)
    db2 = None if b2 is None else du.sum(axis=0)
    return dx, Params(da.T @ z, du.T @ h, db1, db2)


def example(draw):
    reduction = draw.choice("reduction", 1, 2)
    channels = reduction * draw.size("C / reduction")
    x = draw.array(draw.size("N"), channels, draw.size("H"), draw.size("W"))
    params = draw.like(init(draw.rng, channels, reduction, bias=draw.choice("bias", True, False)))
    return Call((x, params), {})


ABOUT = About(
    weights="gate",
    laws=("batch_independent", "weights_in_unit_interval", "pixel_permutation_equivariant"),
    witnesses=("authors' code", "framework", "definition", "relation"),
)
