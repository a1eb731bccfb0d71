r"""Cosine attention with a continuous position bias (Swin V2).

Attention within a window that compares directions of queries and keys, not their lengths, sharpened by a learned
number per head; a small network turns the logarithm of the distance between two pixels into a bias.

Paper: Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", CVPR 2022 (arXiv:2111.09883),
    sections 3.2 and 3.3.

Shapes
    B windows of M by W pixels, T = M W of them row by row, H heads, D features of a query or key, E of a value;
    N = (2 M - 1)(2 W - 1) offsets, U hidden units.

Forward
    c_n = sign(d) log2(1 + 8 |d| / (M - 1)) / log2(8)     of every offset d in rows, and in columns with W
    table_nh = 16 sigmoid(w2 relu(w1 c_n + b1))
    q^ = q / |q|,    k^ = k / |k|
    S = e^min(logit_scale, log 100) q^ k^T + table_n      n as in swin_bias
    P = softmax(S)                            over the keys that the mask allows
    Y = P V

Backward, with a bar for "gradient of the loss with respect to"
    Pbar = Ybar V^T,        Vbar = P^T Ybar
    Sbar = P (Pbar - sum_j Pbar P)            softmax, row by row
    logit_scalebar = sum Sbar e^logit_scale q^ k^T        0 where it is clamped
    q^bar = e^min(...) Sbar k^,               k^bar = e^min(...) Sbar^T q^
    qbar = (q^bar - q^ (q^ . q^bar)) / |q|    and kbar likewise
    tablebar_nh = sum over the pairs of pixels with offset n of Sbar, then sigmoid and the two layers

Choices
    This is the authors' code. In the paper c = sign(d) log(1 + |d|), the table is what the network gives, and S has
    q^ k^T / tau with tau above 0.01; here 1 / tau is e^logit_scale.
    |q| is at least 1e-12, as in torch's normalize: zeros stay zeros, and get the gradient q^bar / 1e-12.
    A logit_scale of log 100 exactly has a gradient, as torch's clamp.
    pretrained is the size of the window to whose M - 1 and W - 1 the distances are compared, where it is not that
    of now. In a window of one row every distance in rows is 0 (in the code 0 / 0).
    The projections of q and v have biases there, that of k has none. In shifted windows the authors add -100 to the
    scores of pixels from elsewhere; mask is True where the key takes part, and leaves nothing of the others.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import swin_bias
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.elementwise import relu, sigmoid
from refattn.primitives import softmax
from refattn.windows import per_axis

CLAMP, EPS = math.log(100), 1e-12


class Params(NamedTuple):
    logit_scale: Shaped[Array, "H"]
    w1: Shaped[Array, "U 2"]
    b1: Shaped[Array, "U"]
    w2: Shaped[Array, "H U"]


class Saved(NamedTuple):
    q: Shaped[Array, "B H T D"]  # of length 1, as k
    k: Shaped[Array, "B H T D"]
    v: Shaped[Array, "B H T E"]
    q_length: Shaped[Array, "B H T 1"]
    k_length: Shaped[Array, "B H T 1"]
    params: Params
    coordinates: Shaped[Array, "N 2"]
    hidden: Shaped[Array, "N U"]
    table: Shaped[Array, "N H"]
    bias: swin_bias.Saved
    cosine: Shaped[Array, "B H T T"]
    attn: Shaped[Array, "B H T T"]


def init(rng, heads, hidden=512):
    """logit_scale = log 10; weights and biases of the network uniform within +-1 / sqrt(inputs), as torch's Linear."""
    w1, b1 = rng.uniform(-1, 1, (hidden, 2)) / math.sqrt(2), rng.uniform(-1, 1, hidden) / math.sqrt(2)
    w2 = rng.uniform(-1, 1, (heads, hidden)) / math.sqrt(hidden)
    return Params(np.full(heads, math.log(10)), w1, b1, w2)


@shaped
def forward(
    q: Shaped[Array, "B H T D"],
    k: Shaped[Array, "B H T D"],
    v: Shaped[Array, "B H T E"],
    params: Params,
    *,
    window: int | tuple,
    pretrained: int | tuple | None = None,
    mask: Shaped[Bools, "B H T T"] | None = None,
) -> tuple[Shaped[Array, "B H T E"], Saved]:
    m, w = per_axis("swin_v2.forward: window", window, 2, 1)
    expect(q.shape[2] == m * w, "swin_v2.forward: q.shape", q.shape, f"T = {m * w}, from window {(m, w)}")
    trained = per_axis("swin_v2.forward: pretrained", (m, w) if pretrained is None else pretrained, 2, 1)
    coordinates = _coordinates((m, w), trained).astype(q.real.dtype)
    hidden = coordinates @ params.w1.T + params.b1
    table = 16 * sigmoid(relu(hidden) @ params.w2.T)
    bias, saved_bias = swin_bias.forward(table, window=(m, w))
    (q, q_length), (k, k_length) = _normalize(q), _normalize(k)
    cosine = q @ k.swapaxes(2, 3)
    attn, _ = softmax.forward(_sharpness(params) * cosine + bias, mask=mask)
    saved = Saved(q, k, v, q_length, k_length, params, coordinates, hidden, table, saved_bias, cosine, attn)
    return attn @ v, saved


@shaped
def backward(
    dy: Shaped[Array, "B H T E"], saved: Saved
) -> tuple[Shaped[Array, "B H T D"], Shaped[Array, "B H T D"], Shaped[Array, "B H T E"], Params]:
    q, k, v, q_length, k_length, params, coordinates, hidden, table, saved_bias, cosine, attn = saved
    dattn, dv = dy @ v.swapaxes(2, 3), attn.swapaxes(2, 3) @ dy
    (dscores,) = softmax.backward(dattn, softmax.Saved(attn, axis=-1))
    dcosine = _sharpness(params) * dscores
    dlogit_scale = (dcosine * cosine).sum(axis=(0, 2, 3)) * (params.logit_scale.real <= CLAMP)
    dq = _normalize_backward(dcosine @ k, q, q_length)
    dk = _normalize_backward(dcosine.swapaxes(2, 3) @ q, k, k_length)
    (dtable,) = swin_bias.backward(dscores.sum(axis=0), saved_bias)
    dlogit = dtable * table * (1 - table / 16)
    dhidden = dlogit @ params.w2 * (hidden.real > 0)
    dparams = Params(dlogit_scale, dhidden.T @ coordinates, dhidden.sum(axis=0), dlogit.T @ relu(hidden))
    return dq, dk, dv, dparams


def _coordinates(window, trained):
    """c of every offset, in the order of the rows of swin_bias's table: (N, 2)."""
    axes = []
    for length, trained_length in zip(window, trained):
        d = 8 * np.arange(1 - length, length) / max(trained_length - 1, 1)
        axes.append(np.sign(d) * np.log2(1 + np.abs(d)) / 3)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def _sharpness(params):
    clamped = np.where(params.logit_scale.real <= CLAMP, params.logit_scale, CLAMP)
    return np.exp(clamped.astype(params.logit_scale.dtype))[:, None, None]


def _normalize(x):
    """x / |x| and |x|, which is at least EPS."""
    squares = (x * x).sum(axis=-1, keepdims=True)
    length = np.sqrt(np.where(squares.real > EPS**2, squares, EPS**2)).astype(x.dtype)
    return x / length, length


def _normalize_backward(d, unit, length):
    along = np.where(length.real > EPS, (d * unit).sum(axis=-1, keepdims=True), 0)
    return (d - unit * along) / length


def example(draw):
    b, heads = draw.size("B", high=2), draw.size("H", high=2)
    m, w = draw.size("M", high=3), draw.size("W", high=2)
    tokens, features, values = m * w, draw.size("D", high=3), draw.size("E", high=2)
    q, k = (_no_zeros(draw.array(b, heads, tokens, features)) for _ in "qk")
    options = {
        "window": (m, w),
        "pretrained": draw.choice("pretrained", None, (3, 4)),
        "mask": draw.mask(b, heads, tokens, tokens) if draw.choice("masked", False, True) else None,
    }
    params = draw.like(init(draw.rng, heads, draw.size("U", high=3)))
    params = params._replace(logit_scale=params.logit_scale + draw.choice("more than the clamp", 0.0, 5.0))
    return Call((q, k, draw.array(b, heads, tokens, values), params), options)


def _no_zeros(x):
    """The direction of a vector near 0 jumps."""
    short = (x * x).sum(axis=-1) < 1 / 16
    x = x.copy()
    x[short, 0] = 1.0
    return x


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("framework", "definition", "relation"),
)
