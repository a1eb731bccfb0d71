r"""Position attention (DANet).

Every pixel adds to itself a weighted mean of all pixels, weighted by how alike their features are.

Paper: Fu, Liu, Tian, Li, Bao, Fang and Lu, "Dual Attention Network for Scene Segmentation", CVPR 2019
(arXiv:1809.02983), section 3.2.

Shapes
    N images, C channels, H by W pixels, K channels of queries and keys. i and j run over all HW pixels.

Forward
    q_i = Wq x_i + bq,   k_i = Wk x_i + bk,   v_i = Wv x_i + bv         1x1 convolutions
    s_ij = q_i . k_j
    a_ij = e^{s_ij} / sum_j e^{s_ij}
    o_i  = sum_j a_ij v_j
    y_i  = x_i + gamma o_i

Backward, with a bar for "gradient of the loss with respect to"
    gammabar = sum_i ybar_i . o_i
    obar_i = gamma ybar_i
    vbar_j = sum_i a_ij obar_i
    abar_ij = obar_i . v_j
    sbar_ij = a_ij (abar_ij - sum_j abar_ij a_ij)
    qbar_i = sum_j sbar_ij k_j,   kbar_j = sum_i sbar_ij q_i
    xbar_i = ybar_i + qbar_i Wq + kbar_i Wk + vbar_i Wv

Choices
    The scores are not divided by sqrt(K), neither in the paper nor in the authors' release.
    K = C / 8, as in the release; the paper keeps K = C. An early text also has batch normalisation and ReLU on
    queries and keys; the release has neither. gamma starts at 0, so that the block starts as the identity.
    bk shifts all scores of a row alike, which softmax does not see: its gradient is always 0.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, shaped
from refattn.primitives import linear


class Params(NamedTuple):
    query: Shaped[linear.Params, "I=C O=K"]
    key: Shaped[linear.Params, "I=C O=K"]
    value: Shaped[linear.Params, "I=C O=C"]
    gamma: Shaped[Array, "1"]


class Saved(NamedTuple):
    query: linear.Saved
    key: linear.Saved
    value: linear.Saved
    q: Shaped[Array, "N P K"]
    k: Shaped[Array, "N P K"]
    v: Shaped[Array, "N P C"]
    weights: Shaped[Array, "N P P"]
    attended: Shaped[Array, "N P C"]
    gamma: Shaped[Array, "1"]


def init(rng, channels, reduction=8):
    """Weights with variance 1 / fan_in, zero biases, gamma = 0."""
    inner = max(channels // reduction, 1)
    return Params(
        query=linear.init(rng, channels, inner),
        key=linear.init(rng, channels, inner),
        value=linear.init(rng, channels, channels),
        gamma=np.zeros(1),
    )


@shaped
def forward(x: Shaped[Array, "N C H W"], params: Params) -> tuple[Shaped[Array, "N C H W"], Saved]:
    rows = _rows(x)
    q, query = linear.forward(rows, params.query)
    k, key = linear.forward(rows, params.key)
    v, value = linear.forward(rows, params.value)
    weights = q @ k.swapaxes(1, 2)
    weights -= weights.real.max(axis=2, keepdims=True, initial=-np.inf)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=2, keepdims=True)
    attended = weights @ v
    y = x + params.gamma * _image(attended, x)
    return y, Saved(query, key, value, q, k, v, weights, attended, params.gamma)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    query, key, value, q, k, v, weights, attended, gamma = saved
    dy_rows = _rows(dy)
    dgamma = (dy_rows * attended).sum().reshape(1)
    dattended = gamma * dy_rows
    dv = weights.swapaxes(1, 2) @ dattended
    dscores = dattended @ v.swapaxes(1, 2)
    dscores -= np.einsum("npq,npq->np", dscores, weights)[:, :, None]
    dscores *= weights
    dq, dk = dscores @ k, dscores.swapaxes(1, 2) @ q
    dx_query, dquery = linear.backward(dq, query)
    dx_key, dkey = linear.backward(dk, key)
    dx_value, dvalue = linear.backward(dv, value)
    return dy + _image(dx_query + dx_key + dx_value, dy), Params(dquery, dkey, dvalue, dgamma)


def _rows(image):
    """(N, C, H, W) to (N, P, C): one row per pixel."""
    return image.reshape(*image.shape[:2], math.prod(image.shape[2:])).swapaxes(1, 2)


def _image(rows, like):
    return rows.swapaxes(1, 2).reshape(like.shape)


def example(draw):
    reduction = draw.choice("reduction", 1, 2)
    channels = reduction * draw.size("C / reduction", high=3)
    x = draw.array(draw.size("N", high=3), channels, draw.size("H", high=3), draw.size("W", high=3))
    params = init(draw.rng, channels, reduction)
    if not draw.choice("biases", True, False):
        params = Params(*(p._replace(bias=None) for p in params[:3]), params.gamma)
    return Call((x, draw.like(params)), {})


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one", "pixel_permutation_equivariant"),
    witnesses=("authors' code", "definition", "relation"),
)
