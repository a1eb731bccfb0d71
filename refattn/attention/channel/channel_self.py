r"""Channel attention (DANet).

Every channel adds to itself a weighted mean of all channels, weighted by how unlike their images are.

Paper: Fu, Liu, Tian, Li, Bao, Fang and Lu, "Dual Attention Network for Scene Segmentation", CVPR 2019
(arXiv:1809.02983), section 3.3.

Shapes
    N images, C channels, H by W pixels; c and d run over all channels, p over all HW pixels.

Forward
    e_cd = sum_p x_cp x_dp
    a_cd = softmax over d of -e_cd
    o_cp = sum_d a_cd x_dp
    y_cp = x_cp + gamma o_cp

Backward, with a bar for "gradient of the loss with respect to"
    gammabar = sum_cp ybar_cp o_cp
    obar_cp  = gamma ybar_cp
    abar_cd  = sum_p obar_cp x_dp
    ebar_cd  = - softmax's gradient of abar_cd
    xbar_cp  = ybar_cp + sum_d (a_dc obar_dp + (ebar_cd + ebar_dc) x_dp)        every channel is query, key and value

Choices
    The authors' release weighs by the softmax of -e, sign=-1, the paper by that of e, sign=1: the authors say that the
    minus is meant. (They subtract e from its maximum in every row; the maximum makes no difference to softmax.)
    gamma starts at 0, so that the block starts as the identity.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.primitives import softmax


class Params(NamedTuple):
    gamma: Shaped[Array, "1"]


class Saved(NamedTuple):
    x: Shaped[Array, "N C P"]
    energy: Shaped[Array, "N C C"]
    weights: Shaped[Array, "N C C"]
    attended: Shaped[Array, "N C P"]
    gamma: Shaped[Array, "1"]
    softmax: softmax.Saved
    sign: int


def init(rng):
    """gamma = 0."""
    return Params(np.zeros(1))


@shaped
def forward(
    x: Shaped[Array, "N C H W"], params: Params, *, sign: int = -1
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    expect(sign in (-1, 1), "channel_self.forward: sign", sign, "-1 or 1")
    flat = _flat(x)
    energy = flat @ flat.swapaxes(1, 2)
    weights, normalised = softmax.forward(sign * energy)
    attended = weights @ flat
    y = x + params.gamma * attended.reshape(x.shape)
    return y, Saved(flat, energy, weights, attended, params.gamma, normalised, sign)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, _, weights, attended, gamma, normalised, sign = saved
    dgamma = (_flat(dy) * attended).sum().reshape(1)
    dattended = gamma * _flat(dy)
    dweights = dattended @ x.swapaxes(1, 2)
    (denergy,) = softmax.backward(dweights, normalised)
    denergy = sign * denergy
    dx = weights.swapaxes(1, 2) @ dattended + (denergy + denergy.swapaxes(1, 2)) @ x
    return dy + dx.reshape(dy.shape), Params(dgamma)


def _flat(image):
    """(N, C, H, W) to (N, C, P): one row per channel."""
    return image.reshape(*image.shape[:2], math.prod(image.shape[2:]))


def example(draw):
    x = draw.array(draw.size("N", high=3), draw.size("C"), draw.size("H", high=3), draw.size("W", high=3))
    return Call((x, draw.like(init(draw.rng))), {"sign": draw.choice("sign", -1, 1)})


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one", "pixel_permutation_equivariant"),
    witnesses=("authors' code", "definition", "relation"),
)
