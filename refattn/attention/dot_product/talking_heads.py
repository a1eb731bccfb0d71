r"""Talking-heads attention.

Heads mix their scores before the softmax, and their weights after it.

Paper: Shazeer et al., "Talking-Heads Attention", 2020 (arXiv:2003.02436), section 4.

Shapes
    B items, Q queries, K keys, D features of a query or key, E features of a value. I heads compare queries and keys,
    H heads have a softmax, O heads have values (in the paper h_k, h and h_v).

Forward
    J_i = scale Q_i K_i^T                     scale is 1 / sqrt(D)
    S_h = sum_i L_hi J_i + l_h                params.pre
    P_h = softmax(S_h)                        row by row, over the keys that the query may attend to
    U_o = sum_h W_oh P_h + w_o                params.post; 0 for all other keys
    Y_o = U_o V_o

Backward, with a bar for "gradient of the loss with respect to"
    Ubar_o = Ybar_o V_o^T, 0 for keys not attended to,    Vbar_o = U_o^T Ybar_o
    Pbar_h = sum_o W_oh Ubar_o                Wbar_oh = sum Ubar_o P_h,   wbar_o = sum Ubar_o, see linear
    Sbar   = P (Pbar - sum_j Pbar P)
    Jbar_i = sum_h L_hi Sbar_h                Lbar_hi = sum Sbar_h J_i,   lbar_h = sum Sbar_h = 0
    Qbar_i = scale Jbar_i K_i,                Kbar_i = scale Jbar_i^T Q_i

Choices
    CaiT has the biases l and w; the paper and x-transformers have none. l changes nothing: softmax does not see it.
    Rows of U may sum to anything, and be negative. Saved.attn is P, which is what a softmax gives.
    mask[b, i, j] is True where key j takes part for query i, in all heads; is_causal as in scaled_dot_product. They are
    applied to S: a -inf in J would spread to all heads, or become NaN. And to U, so that w lets no masked key in.
    x-transformers can add the scores to what they are mixed to: that is L + 1.
    Queries, keys and values are projected before, and heads joined and projected after: see multi_head.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import linear, softmax


class Params(NamedTuple):
    pre: Shaped[linear.Params, "I=I O=H"]
    post: Shaped[linear.Params, "I=H O=O"]


class Saved(NamedTuple):
    q: Shaped[Array, "B I Q D"]
    k: Shaped[Array, "B I K D"]
    v: Shaped[Array, "B O K E"]
    pre: linear.Saved
    attn: Shaped[Array, "B H Q K"]
    post: linear.Saved
    mixed: Shaped[Array, "B O Q K"]  # U
    seen: Shaped[Bools, "B Q K"]
    scale: float


def init(rng, heads, softmax_heads=None, value_heads=None, *, bias=False):
    """Both as linear.init starts them."""
    inner = softmax_heads or heads
    return Params(linear.init(rng, heads, inner, bias), linear.init(rng, inner, value_heads or heads, bias))


@shaped
def forward(
    q: Shaped[Array, "B I Q D"],
    k: Shaped[Array, "B I K D"],
    v: Shaped[Array, "B O K E"],
    params: Params,
    *,
    scale: float | None = None,
    mask: Shaped[Bools, "B Q K"] | None = None,
    is_causal: bool = False,
) -> tuple[Shaped[Array, "B O Q E"], Saved]:
    expect(q.shape[-1] > 0, "talking_heads.forward: q.shape", q.shape, "at least one feature")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    expect(math.isfinite(scale), "talking_heads.forward: scale", scale, "a finite number, or None")
    queries, keys = q.shape[2], k.shape[2]
    seen = np.ones((len(q), queries, keys), bool) if mask is None else mask
    if is_causal:
        seen = seen & np.tri(queries, keys, dtype=bool)
    scores, saved_pre = _mix(scale * (q @ k.swapaxes(-1, -2)), params.pre)
    attn, _ = softmax.forward(scores, mask=np.broadcast_to(seen[:, None], scores.shape))
    mixed, saved_post = _mix(attn, params.post)
    mixed = np.where(seen[:, None], mixed, 0)
    return mixed @ v, Saved(q, k, v, saved_pre, attn, saved_post, mixed, seen, scale)


@shaped
def backward(
    dy: Shaped[Array, "B O Q E"], saved: Saved
) -> tuple[Shaped[Array, "B I Q D"], Shaped[Array, "B I K D"], Shaped[Array, "B O K E"], Params]:
    q, k, v, saved_pre, attn, saved_post, mixed, seen, scale = saved
    dmixed, dv = dy @ v.swapaxes(-1, -2), mixed.swapaxes(-1, -2) @ dy
    dattn, dpost = _unmix(np.where(seen[:, None], dmixed, 0), saved_post)
    (dscores,) = softmax.backward(dattn, softmax.Saved(attn, axis=-1))
    dproducts, dpre = _unmix(dscores, saved_pre)
    return scale * (dproducts @ k), scale * (dproducts.swapaxes(-1, -2) @ q), dv, Params(dpre, dpost)


def _mix(x, params):
    """A linear map of the heads, the axis 1 of x."""
    y, saved = linear.forward(np.moveaxis(x, 1, -1), params)
    return np.moveaxis(y, -1, 1), saved


def _unmix(dy, saved):
    dx, dparams = linear.backward(np.moveaxis(dy, 1, -1), saved)
    return np.moveaxis(dx, -1, 1), dparams


def example(draw):
    b, queries, keys, features = draw.size("B", high=2), draw.size("Q", high=3), draw.size("K", high=3), draw.size("D")
    compared, inner, valued = (draw.size(letter, high=3) for letter in "IHO")
    params = Params(
        linear.init(draw.rng, compared, inner, draw.choice("bias before", True, False)),
        linear.init(draw.rng, inner, valued, draw.choice("bias after", True, False)),
    )
    options = {
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(b, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    q, k = draw.array(b, compared, queries, features), draw.array(b, compared, keys, features)
    return Call((q, k, draw.array(b, valued, keys, draw.size("E", high=3)), draw.like(params)), options)


ABOUT = About(
    weights="attn",
    laws=(
        "batch_independent",
        "weights_in_unit_interval",
        "weights_sum_to_one",
        "key_permutation_invariant",
        "causal",
    ),
    witnesses=("definition", "relation"),
)
