r"""Packed attention: sequences of any lengths one after the other.

No padding is stored. cu_seqlens says where each sequence begins: sequence s has the tokens from cu_seqlens[s] to
cu_seqlens[s + 1], and attends to itself only. Kernels call it varlen, and the layout THD.

Paper: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", ICLR 2024
(arXiv:2307.08691), whose library has it as flash_attn_varlen_func.

Shapes
    Q queries of H heads, K keys of G heads and values of W heads (divisors of H), all sequences together; D features
    of a query or key, E features of a value; C offsets, one more than there are sequences.

Forward, for every sequence, with q its queries, k and v its keys and values
    y, lse = dot_product_attention(q, k, v, sinks)

Backward, with a bar for "gradient of the loss with respect to", for every sequence
    qbar, kbar, vbar = the backward of dot_product_attention
    sinksbar = the sum of what comes from all sequences

Choices
    is_causal and window count from the end: the last query of a sequence stands at its last key, as in flash-attn from
    2.1 on, and in torch's varlen_attn, which is written on it. q_offset="top_left" counts from the beginning.
    lse has heads first, as in flash-attn; the documentation of torch's varlen_attn has (Q, H).
    A sequence may have no queries, or no keys: its queries then get y = 0 and lse = -inf.
    With as many keys as queries it is one sequence under masks.document(lengths=np.diff(cu_seqlens)).
    pad and unpad lead to the layout of dot_product_attention with q_seqlens and kv_seqlens, and back; gradients go the
    same way as what they are of.
"""

import itertools
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention
from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped


class Out(NamedTuple):
    y: Shaped[Array, "Q H E"]
    lse: Shaped[Array, "H Q"] | None = None


class Saved(NamedTuple):
    q: Shaped[Array, "Q H D"]
    k: Shaped[Array, "K G D"]
    v: Shaped[Array, "K W E"]
    sinks: Shaped[Array, "H"] | None
    cu_seqlens_q: Shaped[Ints, "C"]
    sequences: tuple[dot_product_attention.Saved, ...]


@shaped
def forward(
    q: Shaped[Array, "Q H D"],
    k: Shaped[Array, "K G D"],
    v: Shaped[Array, "K W E"],
    sinks: Shaped[Array, "H"] | None = None,
    *,
    cu_seqlens_q: Shaped[Ints, "C"],
    cu_seqlens_k: Shaped[Ints, "C"],
    scale: float | None = None,
    is_causal: bool = False,
    q_offset: str = "bottom_right",
    window: tuple | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Shaped[Array, "Q H E"] | Out, Saved]:
    _lengths("packed.forward: cu_seqlens_q", cu_seqlens_q, len(q))
    _lengths("packed.forward: cu_seqlens_k", cu_seqlens_k, len(k))
    options = {"scale": scale, "is_causal": is_causal, "q_offset": q_offset, "window": window, "softcap": softcap}
    ys, lses, sequences = [], [], []
    for queries, keys in zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k)):
        one = _alone(q[queries]), _alone(k[keys]), _alone(v[keys])
        out, saved = dot_product_attention.forward(*one, None, sinks, **options, return_lse=True)
        ys.append(_unalone(out.y))
        lses.append(out.lse[0])
        sequences.append(saved)
    nothing = np.empty_like(v, shape=(0, q.shape[1], v.shape[2]))  # for when there is no sequence at all
    y, lse = np.concatenate([nothing, *ys]), np.concatenate([nothing[..., 0].T, *lses], axis=1)
    return Out(y, lse) if return_lse else y, Saved(q, k, v, sinks, cu_seqlens_q, tuple(sequences))


@shaped
def backward(
    dout: Shaped[Array, "Q H E"] | Out, saved: Saved
) -> tuple[Shaped[Array, "Q H D"], Shaped[Array, "K G D"], Shaped[Array, "K W E"], Shaped[Array, "H"] | None]:
    q, k, v, sinks, cu_seqlens_q, sequences = saved
    dy, dlse = dout if isinstance(dout, Out) else (dout, None)
    dqs, dks, dvs, dsinks = [q[:0]], [k[:0]], [v[:0]], None if sinks is None else np.zeros_like(sinks)
    for queries, sequence in zip(_spans(cu_seqlens_q), sequences):
        of_lse = None if dlse is None else dlse[None, :, queries]
        dout = dot_product_attention.Out(_alone(dy[queries]), of_lse)
        dq, dk, dv, _, dsink = dot_product_attention.backward(dout, sequence)
        dqs.append(_unalone(dq))
        dks.append(_unalone(dk))
        dvs.append(_unalone(dv))
        dsinks = None if sinks is None else dsinks + dsink
    return np.concatenate(dqs), np.concatenate(dks), np.concatenate(dvs), dsinks


@shaped
def pad(x: Shaped[Array, "T H D"], cu_seqlens: Shaped[Ints, "C"]) -> Shaped[Array, "S H L D"]:
    """S sequences beside one another, each as long as the longest (L), with zeros after its end."""
    lengths = _lengths("packed.pad: cu_seqlens", cu_seqlens, len(x))
    real = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.zeros_like(x, shape=(*real.shape, *x.shape[1:]))
    padded[real] = x
    return padded.swapaxes(1, 2)


@shaped
def unpad(x: Shaped[Array, "S H L D"], cu_seqlens: Shaped[Ints, "C"]) -> Shaped[Array, "T H D"]:
    """The way back: S sequences one after the other, without what comes after their ends."""
    lengths = _lengths("packed.unpad: cu_seqlens", cu_seqlens, cu_seqlens.max(initial=0))
    fits = len(lengths) == len(x) and (lengths <= x.shape[2]).all()
    expect(fits, "packed.unpad: x.shape", x.shape, f"{len(lengths)} sequences, as long as {lengths.max(initial=0)}")
    return x.swapaxes(1, 2)[np.arange(x.shape[2]) < lengths[:, None]]


def _lengths(what, cu_seqlens, tokens):
    """The length of every sequence."""
    c = cu_seqlens.astype(np.int64)
    good = c.size > 0 and c[0] == 0 and c[-1] == tokens and (c[1:] >= c[:-1]).all()
    expect(good, what, cu_seqlens.tolist(), f"offsets from 0 to {tokens}, the number of tokens, that never decrease")
    return np.diff(c)


def _spans(cu_seqlens):
    return [slice(start, stop) for start, stop in itertools.pairwise(cu_seqlens)]


def _alone(x):
    """One sequence, (T, H, D), as a batch, (1, H, T, D)."""
    return x.swapaxes(0, 1)[None]


def _unalone(x):
    return x[0].swapaxes(0, 1)


def example(draw):
    shared, times, sequences = draw.size("G", high=2), draw.size("H / G", high=2), draw.size("S", low=0, high=3)
    cu_q, cu_k = (np.cumsum([0, *draw.integers(0, 3, sequences)]) for _ in range(2))
    queries, keys, heads, features = int(cu_q[-1]), int(cu_k[-1]), shared * times, draw.size("D", high=3)
    q, k = draw.array(queries, heads, features), draw.array(keys, shared, features)
    v = draw.array(keys, draw.choice("W", shared, 1, heads), draw.size("E", high=3))
    sinks = draw.array(heads) if draw.choice("sinks", False, True) else None
    causal, window = draw.choice("is_causal", False, True), draw.choice("window", None, (1, 0), (None, 1), (0, None))
    hidden = causal or window is not None or (np.diff(cu_k) == 0).any()
    options = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "scale": draw.choice("scale", None, 0.5),
        "is_causal": causal,
        "q_offset": draw.choice("q_offset", "bottom_right", "top_left"),
        "window": window,
        "softcap": draw.choice("softcap", None, 1.5),
        "return_lse": (sinks is not None or not hidden) and draw.choice("lse", True, False),  # -inf has no gradient
    }
    return Call((q, k, v, sinks), options)


ABOUT = About(witnesses=("definition", "relation"))
