"""A call of some mechanism as the call of dot_product_attention that it is, where it is one."""

import numpy as np

from refattn.attention.dot_product import dot_product_attention, scaled_dot_product, streaming
from refattn.core import Call

OWN_OF_STREAMING = "block", "jobs", "executor"  # how, not what


def as_dot_product(mechanism, call):
    """The Call of dot_product_attention with the same numbers, or None. Its arrays have axes (B, H, ...)."""
    if mechanism.forward is dot_product_attention.forward and call.options.get("return_scores") is None:
        return call
    if mechanism.forward is streaming.forward:
        return Call(call.args, {name: x for name, x in call.options.items() if name not in OWN_OF_STREAMING})
    if mechanism.forward is scaled_dot_product.forward:
        options = dict(call.options)
        mask = options.pop("mask", None)
        return Call(tuple(map(_with_heads, call.args)), options | {"attn_mask": _with_heads(mask)})
    return None


def _with_heads(x):
    """(B, *H, Q, D) as (B, H, Q, D)."""
    return None if x is None else np.reshape(x, (x.shape[0], int(np.prod(x.shape[1:-2])), *x.shape[-2:]))


def as_it_was(mechanism, canonical, call):
    """The inverse of as_dot_product, for a canonical call that was changed: in the layout of the original `call`."""
    if mechanism.forward is streaming.forward:
        own = {name: x for name, x in call.options.items() if name in OWN_OF_STREAMING}
        return Call(canonical.args, canonical.options | own)
    if mechanism.forward is not scaled_dot_product.forward:
        return canonical
    rank, options = call.args[0].ndim, dict(canonical.options)
    mask = options.pop("attn_mask", None)
    if mask is not None:
        full = (*canonical.args[0].shape[:3], canonical.args[1].shape[2])
        options["mask"] = _without_heads(np.broadcast_to(mask, full), rank)
    return Call(tuple(_without_heads(x, rank) for x in canonical.args), options)


def _without_heads(x, rank):
    """(B, H, Q, D) as (B, *H, Q, D) of a rank; with three axes items and heads are one."""
    if rank == 3:
        return np.reshape(x, (-1, *x.shape[2:]))
    return np.reshape(x, (x.shape[0], *[1] * (rank - 4), *x.shape[1:]))
