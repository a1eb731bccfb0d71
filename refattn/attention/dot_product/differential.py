r"""Differential attention.

The weights are the difference of two softmaxes, so that what both maps see, the noise, cancels.

Paper: Ye et al., "Differential Transformer", ICLR 2025 (arXiv:2410.05258), section 2.1.

Shapes
    B items, H heads, each of 2 heads of queries and keys, Q queries, K keys, D features of a query or key, E features
    of a value (2 D in the paper); L numbers in each of the vectors that make lambda (D in the paper).

Forward, for every head
    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
    O1, O2 = scaled_dot_product(Q1, K1, V), scaled_dot_product(Q2, K2, V)
    O = O1 - lambda O2                        = (P1 - lambda P2) V
    Y = (1 - lambda_init) rms_norm(O)         over the E features of a head

Backward, with a bar for "gradient of the loss with respect to"
    Obar = the backward of rms_norm at (1 - lambda_init) Ybar
    O1bar = Obar,   O2bar = -lambda Obar,     lambdabar = -sum of Obar O2 over everything
    Q1bar, Q2bar, K1bar, K2bar = the backward of scaled_dot_product, and Vbar of both, added
    lambda_q1bar = lambdabar exp(lambda_q1 . lambda_k1) lambda_k1, and so on; those of 2 with a minus

Choices
    lambda_init grows with the depth of the layer: see the function of that name. It has no gradient.
    The authors' module keeps 2 H heads of queries and keys; 2 h and 2 h + 1 are the pair h: reshape to (B, H, 2, T, D).
    params.norm is one gamma for all heads, as in the authors' code; None has none. eps is 1e-5 there.
    With lambda_k1 = lambda_k2 = 1 of length 1, lambda_q1 and lambda_q2 are two scalars, as timm can have them.
    mask[b, h, i, j] is True where key j takes part for query i, in both maps; is_causal as in scaled_dot_product.
    Saved.attn is P1 - lambda P2; some of it is negative. Projections, and the joining of heads: see multi_head.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import scaled_dot_product
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import rms_norm


class Params(NamedTuple):
    lambda_q1: Shaped[Array, "L"]
    lambda_k1: Shaped[Array, "L"]
    lambda_q2: Shaped[Array, "L"]
    lambda_k2: Shaped[Array, "L"]
    norm: Shaped[rms_norm.Params, "D=E"] | None = None


class Saved(NamedTuple):
    maps: scaled_dot_product.Saved
    second: Shaped[Array, "B H Q E"]  # O2
    lam: Shaped[Array, "1"]
    attn: Shaped[Array, "B H Q K"]
    norm: rms_norm.Saved
    params: Params
    lambda_init: float


def init(rng, features, *, value_features=None):
    """The vectors of lambda normal, of standard deviation 0.1; gamma = 1, of 2 `features` if not told otherwise."""
    return Params(*rng.normal(size=(4, features)) / 10, rms_norm.init(rng, value_features or 2 * features))


def lambda_init(layer):
    """0.8 - 0.6 exp(-0.3 layer), for layers counted from 0 (the paper's l - 1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


@shaped
def forward(
    q: Shaped[Array, "B H 2 Q D"],
    k: Shaped[Array, "B H 2 K D"],
    v: Shaped[Array, "B H K E"],
    params: Params,
    *,
    lambda_init: float,
    scale: float | None = None,
    mask: Shaped[Bools, "B H Q K"] | None = None,
    is_causal: bool = False,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "B H Q E"], Saved]:
    expect(math.isfinite(lambda_init), "differential.forward: lambda_init", lambda_init, "a finite number")
    first, second = _exponentials(params)
    lam = first - second + lambda_init
    mask = None if mask is None else np.broadcast_to(mask[:, :, None], (*q.shape[:4], k.shape[3]))
    values = np.broadcast_to(v[:, :, None], (*k.shape[:4], v.shape[-1]))
    y, saved_maps = scaled_dot_product.forward(q, k, values, scale=scale, mask=mask, is_causal=is_causal)
    o, saved_norm = rms_norm.forward(y[:, :, 0] - lam * y[:, :, 1], params.norm, eps=eps)
    attn = saved_maps.attn[:, :, 0] - lam * saved_maps.attn[:, :, 1]
    saved = Saved(saved_maps, y[:, :, 1], lam, attn, saved_norm, params, float(lambda_init))
    return (1 - lambda_init) * o, saved


@shaped
def backward(
    dy: Shaped[Array, "B H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B H 2 Q D"], Shaped[Array, "B H 2 K D"], Shaped[Array, "B H K E"], Params]:
    maps, o2, lam, _, saved_norm, params, initial = saved
    do, dnorm = rms_norm.backward((1 - initial) * dy, saved_norm)
    dlambda = -(do * o2).sum()
    dq, dk, dv = scaled_dot_product.backward(np.stack([do, -lam * do], axis=2), maps)
    first, second = _exponentials(params)
    q1, k1, q2, k2, _ = params
    dvectors = dlambda * first * k1, dlambda * first * q1, -dlambda * second * k2, -dlambda * second * q2
    return dq, dk, dv.sum(axis=2), Params(*dvectors, dnorm)


def _exponentials(params):
    """Of shape (1,): arrays, not scalars, keep their precision next to a Python float."""
    q1, k1, q2, k2, _ = params
    return np.exp((q1 * k1).sum(keepdims=True)), np.exp((q2 * k2).sum(keepdims=True))


def example(draw):
    b, heads, queries, keys = (
        draw.size("B", high=2),
        draw.size("H", high=2),
        draw.size("Q", high=3),
        draw.size("K", high=3),
    )
    features, valued, vector = draw.size("D", high=3), draw.size("E", high=3), draw.size("L", high=3)
    params = draw.like(init(draw.rng, vector, value_features=valued))
    tame = (p / 4 for p in params[:4])  # the exponential of a large sum would drown what is added to it
    params = Params(*tame, draw.choice("norm", params.norm, None))
    options = {
        "lambda_init": draw.choice("lambda_init", 0.2, 0.8, 0.0),
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    q, k = draw.array(b, heads, 2, queries, features), draw.array(b, heads, 2, keys, features)
    return Call((q, k, draw.array(b, heads, keys, valued), params), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "key_permutation_invariant", "mask_is_truncation", "causal"),
    witnesses=("framework", "definition", "relation"),
    exempt=(("large_inputs_stay_finite", "lambda is the exponential of parameters, which nothing here bounds"),),
)
