r"""Merge of partial attention results by log-sum-exp.

Attention over some of the keys, with its lse, is a partial result; of several, over keys of which no two share any,
comes attention over all. So do split-K decoding, ring attention and cascades with a shared prefix.

Paper: Ye et al., "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving", MLSys 2025
(arXiv:2501.01005), section 2.2. In a ring of devices: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise
Transformers for Near-Infinite Context", ICLR 2024 (arXiv:2310.01889).

Shapes
    S parts, B items, H heads, Q queries, E features of a value.

Forward, for one query of one head
    w_s = e^{lse_s} / sum_t e^{lse_t}         softmax over parts
    y   = sum_s w_s y_s
    lse = log sum_s e^{lse_s}

Backward, with a bar for "gradient of the loss with respect to"
    y_sbar   = w_s ybar
    lse_sbar = w_s (ybar . (y_s - y) + lsebar)

Choices
    y and lse are as dot_product_attention returns them with return_lse=True; lse is a natural logarithm. FlashInfer's
    has base 2: times log(2) it is this one.
    A part with lse = -inf saw no key: its y is never read, NaN or not, and its gradients are zero. If all parts are
    such, y is 0 and lse is -inf. FlashAttention-2 says +inf of a query without keys: that is refused here.
    Merging is associative: parts of parts may be merged first. A sink is given to one of the parts only.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.primitives import logsumexp, softmax


class Out(NamedTuple):
    y: Shaped[Array, "B H Q E"]
    lse: Shaped[Array, "B H Q"]


class Saved(NamedTuple):
    parts: Shaped[Array, "S B H Q E"]  # y of every part, 0 where it is empty
    weights: Shaped[Array, "S B H Q"]
    y: Shaped[Array, "B H Q E"]


@shaped
def forward(y: Shaped[Array, "S B H Q E"], lse: Shaped[Array, "S B H Q"]) -> tuple[Out, Saved]:
    where = "merge_partial.forward:"
    expect(len(lse) > 0, f"{where} lse.shape", lse.shape, "at least one part")
    expect(not np.isposinf(lse.real).any(), f"{where} lse", np.inf, "less: a part without keys has -inf")
    weights, _ = softmax.forward(lse, axis=0)
    total, _ = logsumexp.forward(lse, axis=0)
    parts = np.where(np.isneginf(lse.real)[..., None], 0, y)
    merged = (weights[..., None] * parts).sum(axis=0)
    return Out(merged, total), Saved(parts, weights, merged)


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Shaped[Array, "S B H Q E"], Shaped[Array, "S B H Q"]]:
    parts, weights, y = saved
    dy, dlse = dout
    return weights[..., None] * dy, weights * ((dy * (parts - y)).sum(axis=-1) + dlse)


def example(draw):
    """Some parts are empty, but not all: where lse is -inf, the laws have no numbers to compare."""
    shape = draw.size("S"), draw.size("B", high=2), draw.size("H", high=2), draw.size("Q", high=3)
    lse = draw.array(*shape)
    if draw.choice("empty parts", False, True):
        some = draw.mask(*shape)
        some[draw.integers(0, shape[0] - 1)] = True
        lse = np.where(some, lse, -np.inf)
    return Call((draw.array(*shape, draw.size("E", high=3)), lse), {})


ABOUT = About(weights="weights", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
