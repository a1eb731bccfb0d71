r"""Paged attention: keys and values gathered from pages.

The cache of all items lies in pages of one pool. The block table of an item lists its pages in order, and items that
begin alike can share them.

Paper: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023
(arXiv:2309.06180), section 4.

Shapes
    B items, Q queries of H heads; P pages of N tokens, of G heads of keys and W of values (divisors of H); M pages at
    most to an item, K tokens at most; D features of a query or key, E features of a value.

Forward, for item b and its token t < kv_seqlens_b
    k_bt, v_bt = what is at place t mod N of page block_table[b, floor(t / N)]
    y, lse = dot_product_attention(q, k, v, sinks)

Backward, with a bar for "gradient of the loss with respect to"
    qbar, kbar, vbar, sinksbar = the backward of dot_product_attention
    k_pagesbar, v_pagesbar = at every place of every page the sum of kbar_bt, vbar_bt over all that was gathered from it

Choices
    Pages have the layout of flash-attn, vLLM and torch's varlen_attn, (pages, tokens, heads, features); FlashInfer
    calls it NHD, and HND the one with tokens and heads exchanged: pages.swapaxes(1, 2).
    Entries of block_table beyond the length are never read, -1 or not, and neither are the places of pages that no
    length reaches: NaN may be there. kv_seqlens is flash-attn's cache_seqlens and torch's seqused_k.
    is_causal and window count from the end: the last query stands at the last key, as in flash-attn; q_offset may say
    otherwise, as in dot_product_attention.
    Kernels have no backward here, but training over a shared prefix needs one: it is that of a gather.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention
from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped


class Out(NamedTuple):
    y: Shaped[Array, "B H Q E"]
    lse: Shaped[Array, "B H Q"] | None = None


class Saved(NamedTuple):
    attention: dot_product_attention.Saved
    attn: Shaped[Array, "B H Q K"]
    pages: int  # P
    size: int  # N
    token: tuple  # item and position of all that was gathered
    place: tuple  # page and place in it, from which it came


@shaped
def forward(
    q: Shaped[Array, "B H Q D"],
    k_pages: Shaped[Array, "P N G D"],
    v_pages: Shaped[Array, "P N W E"],
    sinks: Shaped[Array, "H"] | None = None,
    *,
    block_table: Shaped[Ints, "B M"],
    kv_seqlens: Shaped[Ints, "B"],
    scale: float | None = None,
    is_causal: bool = False,
    q_offset: int | str | Shaped[Ints, "B"] = "bottom_right",
    window: tuple | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Shaped[Array, "B H Q E"] | Out, Saved]:
    (pages, size), most = k_pages.shape[:2], block_table.shape[1]
    fits = ((kv_seqlens >= 0) & (kv_seqlens <= most * size)).all()
    wanted = f"lengths from 0 to {most * size}, M = {most} pages of N = {size} tokens"
    expect(fits, "paged.forward: kv_seqlens", kv_seqlens.tolist(), wanted)
    token = item, t = np.nonzero(np.arange(kv_seqlens.max(initial=0)) < kv_seqlens[:, None])
    place = page, _ = block_table[item, t // size], t % size
    fits = ((page >= 0) & (page < pages)).all()
    expect(fits, "paged.forward: block_table", block_table.tolist(), f"pages from 0 to {pages - 1} up to kv_seqlens")
    out, attention = dot_product_attention.forward(
        *(q, _gather(k_pages, kv_seqlens, token, place), _gather(v_pages, kv_seqlens, token, place), None, sinks),
        scale=scale, is_causal=is_causal, q_offset=q_offset, window=window, softcap=softcap, kv_seqlens=kv_seqlens,
        return_lse=return_lse,
    )  # fmt: skip
    out = Out(out.y, out.lse) if return_lse else out
    return out, Saved(attention, attention.attn, pages, size, token, place)


@shaped
def backward(
    dout: Shaped[Array, "B H Q E"] | Out, saved: Saved
) -> tuple[Shaped[Array, "B H Q D"], Shaped[Array, "P N G D"], Shaped[Array, "P N W E"], Shaped[Array, "H"] | None]:
    if isinstance(dout, Out):
        dout = dot_product_attention.Out(dout.y, dout.lse)
    dq, dk, dv, _, dsinks = dot_product_attention.backward(dout, saved.attention)
    return dq, _scatter(dk, saved), _scatter(dv, saved), dsinks


def _gather(pages, kv_seqlens, token, place):
    """(B, heads, K, features), zeros from the end of an item on."""
    item, t = token
    _, _, heads, features = pages.shape
    x = np.zeros_like(pages, shape=(len(kv_seqlens), heads, kv_seqlens.max(initial=0), features))
    x[item, :, t] = pages[place]
    return x


def _scatter(dx, saved):
    """The transpose of _gather: what came from one place is added up there."""
    item, t = saved.token
    _, heads, _, features = dx.shape
    dpages = np.zeros_like(dx, shape=(saved.pages, saved.size, heads, features))
    np.add.at(dpages, saved.place, dx[item, :, t])
    return dpages


def example(draw):
    b, shared, times = draw.size("B", high=2), draw.size("G", high=2), draw.size("H / G", high=2)
    heads, values = shared * times, draw.choice("W", shared, 1, shared * times)
    queries, features, passed = draw.size("Q", high=3), draw.size("D", high=3), draw.size("E", high=3)
    pages, size, most = draw.size("P", high=3), draw.size("N", high=3), draw.size("M", high=2)
    lengths, table = draw.integers(0, most * size, b), draw.integers(0, pages - 1, b, most)
    table[np.arange(most) * size >= lengths[:, None]] = -1
    sinks = draw.array(heads) if draw.choice("sinks", False, True) else None
    causal, window = draw.choice("is_causal", False, True), draw.choice("window", None, (1, 0), (None, 1), (0, None))
    hidden = causal or window is not None or (lengths == 0).any()
    options = {
        "block_table": table,
        "kv_seqlens": lengths,
        "scale": draw.choice("scale", None, 0.5),
        "is_causal": causal,
        "q_offset": draw.choice("q_offset", "bottom_right", "top_left", 1),
        "window": window,
        "softcap": draw.choice("softcap", None, 1.5),
        "return_lse": (sinks is not None or not hidden) and draw.choice("lse", True, False),  # -inf has no gradient
    }
    q, k = draw.array(b, heads, queries, features), draw.array(pages, size, shared, features)
    return Call((q, k, draw.array(pages, size, values, passed), sinks), options)


ABOUT = About(
    weights="attn", laws=("batch_independent", "weights_in_unit_interval"), witnesses=("definition", "relation")
)
