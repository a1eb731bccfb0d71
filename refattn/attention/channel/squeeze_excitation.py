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
    Biases are kept, as in the authors' release. relu'(0) = 0.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, shaped
from refattn.elementwise import relu, sigmoid


class Params(NamedTuple):
    w1: Shaped[Array, "R C"]
    b1: Shaped[Array, "R"]
    w2: Shaped[Array, "C R"]
    b2: Shaped[Array, "C"]


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    z: Shaped[Array, "N C"]
    h: Shaped[Array, "N R"]
    gate: Shaped[Array, "N C"]
    params: Params


def init(rng, channels, reduction=16):
    """Weights with variance 1 / fan_in, zero biases."""
    hidden = max(channels // reduction, 1)
    return Params(
        w1=rng.normal(size=(hidden, channels)) / np.sqrt(channels),
        b1=np.zeros(hidden),
        w2=rng.normal(size=(channels, hidden)) / np.sqrt(hidden),
        b2=np.zeros(channels),
    )


@shaped
def forward(x: Shaped[Array, "N C H W"], params: Params) -> tuple[Shaped[Array, "N C H W"], Saved]:
    z = x.mean(axis=(2, 3))
    h = relu(z @ params.w1.T + params.b1)
    gate = sigmoid(h @ params.w2.T + params.b2)
    return x * gate[:, :, None, None], Saved(x, z, h, gate, params)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, z, h, gate, params = saved
    dgate = (dy * x).sum(axis=(2, 3))
    du = dgate * gate * (1 - gate)
    da = (du @ params.w2) * (h.real > 0)
    dz = da @ params.w1
    dx = dy * gate[:, :, None, None] + dz[:, :, None, None] / (x.shape[2] * x.shape[3])
    return dx, Params(w1=da.T @ z, b1=da.sum(axis=0), w2=du.T @ h, b2=du.sum(axis=0))


def example(draw):
    reduction = draw.choice("reduction", 1, 2)
    channels = reduction * draw.size("C / reduction")
    x = draw.array(draw.size("N"), channels, draw.size("H"), draw.size("W"))
    return Call((x, draw.like(init(draw.rng, channels, reduction))), {})


ABOUT = About(
    weights="gate",
    laws=("batch_independent", "weights_in_unit_interval", "pixel_permutation_equivariant"),
)
