r"""Attention pooling with learned queries (MAP head).

A few learned vectors ask all tokens, and what they hear goes through one residual feed-forward network.

Paper: Zhai et al., "Scaling Vision Transformers", CVPR 2022 (arXiv:2106.04560), section 3.2; after Lee et al., "Set
Transformer", ICML 2019 (arXiv:1810.00825), section 3.2.

Shapes
    B items, T tokens of C features, L latents of D features; O features of each latent come out.

Forward
    Y = multi_head(latents, x, x)             the same latents for every item
    Z = Y + feed_forward(layer_norm(Y))       without params.mlp, Z = Y

Backward, with a bar for "gradient of the loss with respect to"
    Ybar = Zbar + the backward of layer_norm, of the backward of feed_forward
    latentsbar = sum over the items of the first gradient of multi_head
    xbar = the sum of the other two

Choices
    The authors have one latent and take its Z; timm takes the first, or the mean of them all.
    Latents are not added to Y. In the Set Transformer's PMA they are: that is set_attention, whose queries are seeds.
    activation is "gelu_tanh" and eps 1e-6, as in the authors' code; timm has "gelu" and 1e-5.
    key_mask[b, j] is True where token j takes part. An item with no tokens has Y = bo.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import multi_head
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import feed_forward, layer_norm, linear


class Params(NamedTuple):
    latents: Shaped[Array, "L D"]
    attention: Shaped[multi_head.Params, "E=D F=C G=C O=O"]
    norm: layer_norm.Params | None = None
    mlp: Shaped[feed_forward.Params, "D=O O=O"] | None = None


class Saved(NamedTuple):
    heads: multi_head.Saved
    attn: Shaped[Array, "B H L A"]
    norm: layer_norm.Saved | None
    mlp: feed_forward.Saved | None


def init(rng, features, latents=1, *, hidden=None):
    """Latents normal, of variance 1 / features; the rest as each part starts. hidden is 4 `features` if not given."""
    return Params(
        rng.normal(size=(latents, features)) / math.sqrt(features),
        multi_head.init(rng, features),
        layer_norm.init(rng, features),
        feed_forward.init(rng, features, hidden or 4 * features),
    )


@shaped
def forward(
    x: Shaped[Array, "B T C"],
    params: Params,
    *,
    heads: int,
    key_mask: Shaped[Bools, "B T"] | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
) -> tuple[Shaped[Array, "B L O"], Saved]:
    fits = params.norm is None or params.mlp is not None
    expect(fits, "latent_pool.forward: params.norm", params.norm, "None without params.mlp, which it goes before")
    queries = np.broadcast_to(params.latents, (len(x), *params.latents.shape))
    y, saved = multi_head.forward(queries, x, x, params.attention, heads=heads, key_mask=key_mask)
    if params.mlp is None:
        return y, Saved(saved, saved.attn, None, None)
    normed, saved_norm = layer_norm.forward(y, params.norm, eps=eps)
    change, saved_mlp = feed_forward.forward(normed, params.mlp, activation=activation)
    return y + change, Saved(saved, saved.attn, saved_norm, saved_mlp)


@shaped
def backward(dz: Shaped[Array, "B L O"], saved: Saved) -> tuple[Shaped[Array, "B T C"], Params]:
    dy, dnorm, dmlp = dz, None, None
    if saved.mlp is not None:
        dnormed, dmlp = feed_forward.backward(dz, saved.mlp)
        dchange, dnorm = layer_norm.backward(dnormed, saved.norm)
        dy = dz + dchange
    dqueries, dk, dv, dattention = multi_head.backward(dy, saved.heads)
    return dk + dv, Params(dqueries.sum(axis=0), dattention, dnorm, dmlp)


def example(draw):
    heads = draw.choice("heads", 1, 2)
    b, tokens, features = draw.size("B", high=2), draw.size("T", high=3), draw.size("C", high=3)
    latents, width, out = draw.size("L", high=3), draw.size("D", high=3), draw.size("O", high=3)
    compared, passed = heads * draw.size("P / heads", high=2), heads * draw.size("V / heads", high=2)
    sizes, bias = (
        ((width, compared), (features, compared), (features, passed), (passed, out)),
        draw.choice("bias", True, False),
    )
    params = Params(
        np.zeros((latents, width)), multi_head.Params(*(linear.init(draw.rng, *size, bias) for size in sizes))
    )
    if draw.choice("mlp", True, False):
        params = params._replace(mlp=feed_forward.init(draw.rng, out, draw.size("M", high=3), bias=bias))
        if draw.choice("affine norm", True, False):
            params = params._replace(norm=layer_norm.init(draw.rng, out))
    options = {
        "heads": heads,
        "key_mask": draw.mask(b, tokens) if draw.choice("padded", False, True) else None,
        "activation": draw.choice("activation", "gelu_tanh", "relu"),
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    return Call((draw.array(b, tokens, features), draw.like(params)), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("framework", "definition", "relation"),
)
