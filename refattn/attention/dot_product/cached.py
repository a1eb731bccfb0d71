r"""Decoding with a cache of keys and values.

New tokens attend to those before them, whose keys and values were kept, and to one another; then theirs are kept too.

Paper: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019 (arXiv:1911.02150), which writes the
incremental form of multi-head attention down.

Shapes
    B items, T new tokens, of H heads of queries, G heads of keys and W of values (divisors of H); D features of a query
    or key, E features of a value; a past of P tokens, and a present of R.

Forward
    present_k, present_v = the past, and in it from n on the new keys and values: n = P, or cache_seqlens
    y = dot_product_attention(q, present_k, present_v, sinks), where query i stands at position n + i, and the keys are
        those of positions 0 to n + T - 1

Backward, with a bar for "gradient of the loss with respect to"
    qbar, present_kbar, present_vbar = the backward of dot_product_attention, and to the last two is added what comes
        from later steps
    k_newbar, v_newbar   = the part of it from n to n + T - 1
    past_kbar, past_vbar = the rest, and 0 where the new was written over it

Choices
    Without cache_seqlens the new is put after the past, as in ONNX's Attention: R = P + T. With it the past is a buffer
    whose first cache_seqlens[b] places are filled, and the new is written after them, as in flash-attn's
    flash_attn_with_kvcache and ONNX's TensorScatter: R = P. Places that are not filled are never read, whatever is in
    them; they stay as they are, so only present's gradient reaches them.
    The first step has a past of no tokens. is_causal is True unless told; in both of those it is False.
    Keys are kept as they are given: rotate them (rotary) for their positions n, n + 1, ... first.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention
from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped


class Out(NamedTuple):
    y: Shaped[Array, "B H T E"]
    present_k: Shaped[Array, "B G R D"]
    present_v: Shaped[Array, "B W R E"]


class Saved(NamedTuple):
    attention: dot_product_attention.Saved
    attn: Shaped[Array, "B H T R"]
    slots: Shaped[Ints, "B T"]  # of the new tokens in the present
    past: int  # P


@shaped
def forward(
    q: Shaped[Array, "B H T D"],
    k_new: Shaped[Array, "B G T D"],
    v_new: Shaped[Array, "B W T E"],
    past_k: Shaped[Array, "B G P D"],
    past_v: Shaped[Array, "B W P E"],
    sinks: Shaped[Array, "H"] | None = None,
    *,
    cache_seqlens: Shaped[Ints, "B"] | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple | None = None,
    softcap: float | None = None,
) -> tuple[Out, Saved]:
    batch, tokens, past = len(q), q.shape[2], past_k.shape[2]
    filled, room = np.full(batch, past), past + tokens
    if cache_seqlens is not None:
        filled, room = cache_seqlens.astype(np.int64), past
    fits = ((filled >= 0) & (filled + tokens <= room)).all()
    wanted = f"at least 0, and with T = {tokens} at most P = {past}"
    expect(fits, "cached.forward: cache_seqlens", filled.tolist(), wanted)
    slots = filled[:, None] + np.arange(tokens)
    present_k, present_v = _write(past_k, k_new, slots, room), _write(past_v, v_new, slots, room)
    known = (np.arange(room) < filled[:, None] + tokens)[:, None, :, None]
    y, attention = dot_product_attention.forward(
        *(q, np.where(known, present_k, 0), np.where(known, present_v, 0), None, sinks),
        scale=scale, is_causal=is_causal, q_offset=filled, window=window, softcap=softcap, kv_seqlens=filled + tokens,
    )  # fmt: skip
    return Out(y, present_k, present_v), Saved(attention, attention.attn, slots, past)


@shaped
def backward(
    dout: Out, saved: Saved
) -> tuple[
    Shaped[Array, "B H T D"],
    Shaped[Array, "B G T D"],
    Shaped[Array, "B W T E"],
    Shaped[Array, "B G P D"],
    Shaped[Array, "B W P E"],
    Shaped[Array, "H"] | None,
]:
    attention, _, slots, past = saved
    dy, dpresent_k, dpresent_v = dout
    dq, dk, dv, _, dsinks = dot_product_attention.backward(dy, attention)
    dpast_k, dk_new = _write_backward(dk + dpresent_k, slots, past)
    dpast_v, dv_new = _write_backward(dv + dpresent_v, slots, past)
    return dq, dk_new, dv_new, dpast_k, dpast_v, dsinks


def _write(past, new, slots, room):
    """The past in an array of `room` tokens, with the new ones in their slots."""
    batch, heads, length, features = past.shape
    present = np.zeros_like(past, shape=(batch, heads, room, features), dtype=np.result_type(past, new))
    present[:, :, :length] = past
    present[np.arange(batch)[:, None], :, slots] = new.swapaxes(1, 2)  # (B, T, heads, features)
    return present


def _write_backward(dpresent, slots, past):
    """The gradients of the past and of the new."""
    at = np.arange(len(dpresent))[:, None], slice(None), slots
    dnew, dpast = dpresent[at].swapaxes(1, 2), dpresent.copy()
    dpast[at] = 0  # what was there was overwritten
    return dpast[:, :, :past], dnew


def example(draw):
    b, shared, times = draw.size("B", high=2), draw.size("G", high=2), draw.size("H / G", high=2)
    heads, values = shared * times, draw.choice("W", shared, 1, shared * times)
    tokens, features, passed = draw.size("T"), draw.size("D", high=3), draw.size("E", high=3)
    past = draw.size("P", low=0)
    lengths = draw.integers(0, past, b) if draw.choice("buffer", False, True) else None
    if lengths is not None:
        past += tokens
    new = (b, heads, tokens, features), (b, shared, tokens, features), (b, values, tokens, passed)
    sinks = draw.array(heads) if draw.choice("sinks", False, True) else None
    options = {
        "cache_seqlens": lengths,
        "scale": draw.choice("scale", None, 0.5),
        "is_causal": draw.choice("is_causal", True, False),
        "window": draw.choice("window", None, (1, 0), (None, 1), (0, None)),
        "softcap": draw.choice("softcap", None, 1.5),
    }
    old = draw.array(b, shared, past, features), draw.array(b, values, past, passed)
    return Call((*(draw.array(*shape) for shape in new), *old, sinks), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval"),
    witnesses=("framework", "definition", "relation"),
)
