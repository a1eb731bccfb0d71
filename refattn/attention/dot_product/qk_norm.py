r"""Attention with normalised queries and keys (QK-norm).

Queries and keys are brought to one length before they meet, so that scores stay small however large the weights grow.

Paper: Henry et al., "Query-Key Normalization for Transformers", Findings of EMNLP 2020 (arXiv:2010.04245), section 3:
l2 with a learned scale. Other norms: Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", ICML 2023
(arXiv:2302.05442), section 2.

Shapes
    B items, H heads, Q queries, K keys, D features of a query or key, E features of a value; cos and sin of F angles
    for each query and each key, see rotary.

Forward, norm() over the D features of every query and key
    Qn, Kn = gamma_q norm(Q) + beta_q, gamma_k norm(K) + beta_k
    Qr, Kr = rotary(Qn), rotary(Kn)           with rotary=None, Qn and Kn; order="rotary_first" turns before the norm
    Qs_h = g_h Qr_h                           g is params.logit_scale, one number per head; without it, 1
    Y = scaled_dot_product(Qs, Kr, V)         scale is 1 / sqrt(D); for norm="l2" it is 1

Backward, with a bar for "gradient of the loss with respect to"
    Qsbar, Krbar, Vbar = the backward of scaled_dot_product
    g_hbar = sum over items, queries and features of Qsbar_h Qr_h,   Qrbar_h = g_h Qsbar_h
    Qnbar, Knbar, and the gradients of cos and sin = the backward of rotary
    Qbar, Kbar, gammabar, betabar = the backward of the norms; gamma and beta get the sum over the heads

Choices
    norm: "l2", x / |x|, as Henry (with g; x-transformers: scale=10); "rms", rms_norm, as Qwen3, Gemma 3, and Llama 4,
    whose "L2Norm" is one without gamma; "layer", layer_norm, as Chameleon. ViT-22B has layer norms without bias and
    centering, which is "rms". l2 is rms / sqrt(D): without gamma, rms and its own scale are l2 with scale sqrt(D).
    eps is inside the root, next to the mean square or the variance; for l2 that is x / sqrt(|x|^2 + D eps). torch's
    normalize(x) is eps=0 here. 1e-6 is that of most models; torch's own defaults are 1e-5 and the machine epsilon.
    order: "norm_first" as most; "rotary_first" as HunYuan and Llama 4. Turning changes no length, so that without
    gamma the two are the same but for "layer", which subtracts a mean.
    beta_k changes nothing unless it is turned after: the softmax does not see what all scores of a query share.
    OLMo 2 normalises all heads together: rms_norm before the heads are split, and scaled_dot_product.
    mask and is_causal are those of scaled_dot_product.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import rotary as rotation
from refattn.attention.dot_product import scaled_dot_product
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import layer_norm, rms_norm


class Norm(NamedTuple):
    gamma: Shaped[Array, "D"]
    beta: Shaped[Array, "D"] | None = None  # for norm="layer"


class Rotary(NamedTuple):
    cos_q: Shaped[Array, "B Q F"]
    sin_q: Shaped[Array, "B Q F"]
    cos_k: Shaped[Array, "B K F"]
    sin_k: Shaped[Array, "B K F"]


class Params(NamedTuple):
    q: Norm | None = None
    k: Norm | None = None
    logit_scale: Shaped[Array, "H"] | None = None


class Saved(NamedTuple):
    q: tuple  # of _prepare: saved by the norm, and by the rotary embedding
    k: tuple
    q_ready: Shaped[Array, "B H Q D"]  # Qr
    logit_scale: Shaped[Array, "H"] | None
    heads: scaled_dot_product.Saved
    attn: Shaped[Array, "B H Q K"]
    norm: str
    order: str


def init(rng, features, heads, *, beta=False, logit_scale=None):
    """gamma = 1, beta = 0, for queries and keys alike; `logit_scale` for every head, if it is given."""
    norm = Norm(np.ones(features), np.zeros(features) if beta else None)
    return Params(norm, norm, None if logit_scale is None else np.full(heads, float(logit_scale)))


@shaped
def forward(
    q: Shaped[Array, "B H Q D"],
    k: Shaped[Array, "B H K D"],
    v: Shaped[Array, "B H K E"],
    params: Params,
    rotary: Rotary | None = None,
    *,
    norm: str = "rms",
    order: str = "norm_first",
    pairing: str = "interleaved",
    scale: float | None = None,
    mask: Shaped[Bools, "B H Q K"] | None = None,
    is_causal: bool = False,
    eps: float = 1e-6,
) -> tuple[Shaped[Array, "B H Q E"], Saved]:
    _check(norm, order, params)
    tables_q, tables_k = (None, None) if rotary is None else (rotary[:2], rotary[2:])
    q_ready, saved_q = _prepare(q, params.q, tables_q, norm, order, pairing, eps)
    k_ready, saved_k = _prepare(k, params.k, tables_k, norm, order, pairing, eps)
    scaled = q_ready if params.logit_scale is None else params.logit_scale[:, None, None] * q_ready
    if scale is None and norm == "l2":
        scale = 1.0
    y, saved = scaled_dot_product.forward(scaled, k_ready, v, scale=scale, mask=mask, is_causal=is_causal)
    return y, Saved(saved_q, saved_k, q_ready, params.logit_scale, saved, saved.attn, norm, order)


@shaped
def backward(
    dy: Shaped[Array, "B H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B H Q D"], Shaped[Array, "B H K D"], Shaped[Array, "B H K E"], Params, Rotary | None]:
    dscaled, dk_ready, dv = scaled_dot_product.backward(dy, saved.heads)
    dq_ready, dlogit_scale = dscaled, None
    if saved.logit_scale is not None:
        dlogit_scale = (dscaled * saved.q_ready).sum(axis=(0, 2, 3))
        dq_ready = saved.logit_scale[:, None, None] * dscaled
    dq, dnorm_q, dtables_q = _unprepare(dq_ready, saved.q, saved.norm, saved.order)
    dk, dnorm_k, dtables_k = _unprepare(dk_ready, saved.k, saved.norm, saved.order)
    drotary = None if dtables_q is None else Rotary(*dtables_q, *dtables_k)
    return dq, dk, dv, Params(dnorm_q, dnorm_k, dlogit_scale), drotary


def _prepare(x, params, tables, norm, order, pairing, eps):
    """x normalised and turned, in either order."""
    saved_rotary = None
    if tables is not None and order == "rotary_first":
        x, saved_rotary = rotation.forward(x, *tables, pairing=pairing)
    x, saved_norm = _normalise(x, params, norm, eps)
    if tables is not None and order == "norm_first":
        x, saved_rotary = rotation.forward(x, *tables, pairing=pairing)
    return x, (saved_norm, saved_rotary)


def _unprepare(dx, saved, norm, order):
    (saved_norm, saved_rotary), dtables = saved, None
    if saved_rotary is not None and order == "norm_first":
        dx, *dtables = rotation.backward(dx, saved_rotary)
    dx, dparams = _unnormalise(dx, saved_norm, norm)
    if saved_rotary is not None and order == "rotary_first":
        dx, *dtables = rotation.backward(dx, saved_rotary)
    return dx, dparams, dtables


def _normalise(x, params, norm, eps):
    if norm == "layer":
        return layer_norm.forward(x, params and layer_norm.Params(*params), eps=eps)
    y, saved = rms_norm.forward(x, params and rms_norm.Params(params.gamma), eps=eps)
    return y if norm == "rms" else y / math.sqrt(x.shape[-1]), saved


def _unnormalise(dy, saved, norm):
    if norm == "layer":
        dx, dparams = layer_norm.backward(dy, saved)
    else:
        dx, dparams = rms_norm.backward(dy if norm == "rms" else dy / math.sqrt(dy.shape[-1]), saved)
    return dx, dparams and Norm(*dparams)


def _check(norm, order, params):
    where, norms, orders = "qk_norm.forward:", ("rms", "layer", "l2"), ("norm_first", "rotary_first")
    expect(norm in norms, f"{where} norm", norm, f"one of {', '.join(norms)}")
    expect(order in orders, f"{where} order", order, f"one of {', '.join(orders)}")
    for name, part in (("q", params.q), ("k", params.k)):
        fits = norm == "layer" or part is None or part.beta is None
        expect(fits, f"{where} params.{name}.beta", part and part.beta, f"None for norm={norm!r}")


def example(draw):
    norm = draw.choice("norm", "l2", "rms", "layer", "layer")
    b, heads, queries, keys = (
        draw.size(letter, high=high) for letter, high in (("B", 2), ("H", 2), ("Q", 3), ("K", 4))
    )
    pairs = draw.size("F", high=2)
    features = 2 * pairs + draw.choice("features that stay", 0, 1)
    beta, logit_scale = norm == "layer" and draw.choice("beta", True, False), draw.choice("logit_scale", None, 1.0)
    params = draw.like(init(draw.rng, features, heads, beta=beta, logit_scale=logit_scale))
    if draw.choice("gamma", "of both", "of both", "of queries") == "of queries":
        params = params._replace(k=None)
    rotary = None
    if draw.choice("rotary", True, True, False):
        rotary = Rotary(*(draw.array(b, count, pairs) for count in (queries, queries, keys, keys)))
    options = {
        "norm": norm,
        "order": draw.choice("order", "norm_first", "rotary_first"),
        "pairing": draw.choice("pairing", "interleaved", "half"),
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    q, k = draw.array(b, heads, queries, features), draw.array(b, heads, keys, features)
    return Call((q, k, draw.array(b, heads, keys, draw.size("E", high=3)), params, rotary), options)


ABOUT = About(
    weights="attn",
    laws=(
        "batch_independent",
        "weights_in_unit_interval",
        "weights_sum_to_one",
        "key_permutation_invariant",
        "mask_is_truncation",
        "causal",
    ),
    witnesses=("framework", "definition", "relation"),
)
