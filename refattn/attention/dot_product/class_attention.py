r"""Class attention.

Only the first token, which stands for the class, asks; it reads from all tokens, and from itself.

Paper: Touvron et al., "Going Deeper with Image Transformers" (CaiT), ICCV 2021 (arXiv:2103.17239), section 3.2.

Shapes
    B items, T tokens (the class first, then the patches) of C features; O features of the class come out.

Forward
    y = multi_head(x_0, x, x)                 queries of the class alone, keys and values of all

Backward, with a bar for "gradient of the loss with respect to"
    x_0bar, xbar of keys and of values = the backward of multi_head
    xbar = the sum; the patches get theirs through keys and values only

Choices
    params is multi_head.Params. The paper has every bias; timm has none in Wq, Wk and Wv unless told (qkv_bias), and
    CaiT's models tell it.
    CaiT's block adds y to the class token alone, after scaling every feature (LayerScale), and so with the MLP; x here
    is normalised already. XCiT's block also adds the normalised patches to theirs.
"""

from typing import NamedTuple

from refattn.attention.dot_product import multi_head
from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.primitives import linear


class Saved(NamedTuple):
    heads: multi_head.Saved
    attn: Shaped[Array, "B H 1 A"]


@shaped
def forward(
    x: Shaped[Array, "B T C"], params: Shaped[multi_head.Params, "E=C F=C G=C O=O"], *, heads: int
) -> tuple[Shaped[Array, "B 1 O"], Saved]:
    expect(x.shape[1] > 0, "class_attention.forward: x.shape", x.shape, "at least one token, the class")
    y, saved = multi_head.forward(x[:, :1], x, x, params, heads=heads)
    return y, Saved(saved, saved.attn)


@shaped
def backward(
    dy: Shaped[Array, "B 1 O"], saved: Saved
) -> tuple[Shaped[Array, "B T C"], Shaped[multi_head.Params, "E=C F=C G=C O=O"]]:
    dclass, dk, dv, dparams = multi_head.backward(dy, saved.heads)
    dx = dk + dv
    dx[:, :1] += dclass
    return dx, dparams


def example(draw):
    heads = draw.choice("heads", 1, 2)
    b, tokens, features, out = draw.size("B", high=2), draw.size("T"), draw.size("C"), draw.size("O")
    compared, passed = heads * draw.size("P / heads", high=2), heads * draw.size("V / heads", high=2)
    sizes = (features, compared), (features, compared), (features, passed), (passed, out)
    bias = draw.choice("bias", True, False)
    params = multi_head.Params(*(linear.init(draw.rng, *size, bias) for size in sizes))
    return Call((draw.array(b, tokens, features), draw.like(params)), {"heads": heads})


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("definition",),
)
