r"""Attention pooling of an image (CLIP).

The mean of all pixels asks, and the pixels answer: a weighted mean in the place of the plain one.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), ICML 2021
(arXiv:2103.00020), section 2.4.

Shapes
    N images of C channels, H by W pixels, which are T = H W + 1 tokens with their mean; O features come out.

Forward
    t = [mean(x), x_1 ... x_HW] + position    row by row; with params.position=None nothing is added
    y = multi_head(t_0, t, t)                 one query, of the mean

Backward, with a bar for "gradient of the loss with respect to"
    tbar = the backward of multi_head; of the query, the keys and the values, added
    positionbar = sum over the images of tbar
    xbar_i = tbar_i + 1 / (H W) t_0bar

Choices
    CLIP's code passes all tokens as keys and values and the first as query, as here; timm may let all ask, takes the
    first answer too, and makes Wq, Wk and Wv of one matrix.
    The first position is that of the mean. Positions for another size of image are resized by whoever calls.
    A learned class token in the place of the mean is class_attention.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import multi_head
from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.primitives import linear


class Params(NamedTuple):
    attention: Shaped[multi_head.Params, "E=C F=C G=C O=O"]
    position: Shaped[Array, "T C"] | None = None


class Saved(NamedTuple):
    heads: multi_head.Saved
    attn: Shaped[Array, "N heads 1 A"]
    size: tuple  # H, W
    positioned: bool


def init(rng, features, size):
    """multi_head.init, and normal positions of variance 1 / features for images of `size` = (H, W)."""
    position = rng.normal(size=(size[0] * size[1] + 1, features)) / math.sqrt(features)
    return Params(multi_head.init(rng, features), position)


@shaped
def forward(x: Shaped[Array, "N C H W"], params: Params, *, heads: int) -> tuple[Shaped[Array, "N O"], Saved]:
    n, c, h, w = x.shape
    expect(h * w > 0, "attention_pool.forward: x.shape", x.shape, "at least one pixel")
    position = params.position
    fits = position is None or len(position) == h * w + 1
    expect(fits, "attention_pool.forward: params.position.shape", fits or position.shape, f"({h} * {w} + 1, C)")
    pixels = x.reshape(n, c, h * w).swapaxes(1, 2)
    tokens = np.concatenate([pixels.mean(axis=1, keepdims=True), pixels], axis=1)
    if position is not None:
        tokens = tokens + position
    y, saved = multi_head.forward(tokens[:, :1], tokens, tokens, params.attention, heads=heads)
    return y[:, 0], Saved(saved, saved.attn, (h, w), position is not None)


@shaped
def backward(dy: Shaped[Array, "N O"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    dfirst, dk, dv, dattention = multi_head.backward(dy[:, None], saved.heads)
    dtokens = dk + dv
    dtokens[:, :1] += dfirst
    dpixels = dtokens[:, 1:] + dtokens[:, :1] / math.prod(saved.size)
    dx = dpixels.swapaxes(1, 2).reshape(len(dy), dtokens.shape[-1], *saved.size)
    return dx, Params(dattention, dtokens.sum(axis=0) if saved.positioned else None)


def example(draw):
    heads = draw.choice("heads", 1, 2)
    n, c, h, w = draw.size("N", high=2), draw.size("C"), draw.size("H", high=3), draw.size("W", high=3)
    compared, passed = heads * draw.size("P / heads", high=2), heads * draw.size("V / heads", high=2)
    sizes, bias = (
        ((c, compared), (c, compared), (c, passed), (passed, draw.size("O"))),
        draw.choice("bias", True, False),
    )
    attention = multi_head.Params(*(linear.init(draw.rng, *size, bias) for size in sizes))
    position = np.zeros((h * w + 1, c)) if draw.choice("position", True, False) else None
    return Call((draw.array(n, c, h, w), draw.like(Params(attention, position))), {"heads": heads})


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("framework", "definition", "relation"),
)
