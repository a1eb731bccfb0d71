"""A call of some mechanism as the call of dot_product_attention that it is, where it is one."""

import numpy as np

from refattn.attention.dot_product import dot_product_attention, scaled_dot_product, streaming
from refattn.core import Call


def as_dot_product(mechanism, call):
    """The Call of dot_product_attention with the same numbers, or None. Its arrays have axes (B, H, ...)."""
    same = {dot_product_attention.forward, streaming.forward}
    if mechanism.forward in same and call.options.get("return_scores") is None:
        return call
    if mechanism.forward is scaled_dot_product.forward:
        options = dict(call.options)
        mask = options.pop("mask", None)
        return Call(tuple(map(_with_heads, call.args)), options | {"attn_mask": _with_heads(mask)})
    return None


def _with_heads(x):
    """(B, *H, Q, D) as (B, H, Q, D)."""
    return None if x is None else np.reshape(x, (x.shape[0], int(np.prod(x.shape[1:-2])), *x.shape[-2:]))
