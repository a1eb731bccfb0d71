"""Attention in blocks of keys, in float32: a small kernel of the kind that `refattn check` is for. This one is right.

    refattn check blocked_attention.py:forward --like scaled_dot_product --backward blocked_attention.py:backward

Scores are never all there at once. Kept for every query: m, the largest score so far; total, the sum of exponentials;
o, the sum of values weighted by them. When a block raises m, what was summed before shrinks by e^(old m - new m).
"""

import numpy as np

QUERIES, KEYS = 16, 16  # the sizes of a tile


def forward(q, k, v, *, is_causal=False):
    """(out, lse), the latter for backward: the logarithm of the sum of exponentials, per query."""
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.empty(q.shape[:-1], q.dtype)
    for rows in blocks(q, QUERIES):
        m = np.full(q[..., rows, :].shape[:-1], -np.inf, q.dtype)
        total = np.zeros_like(m)
        o = np.zeros_like(out[..., rows, :])
        for columns in blocks(k, KEYS):
            s = scores(q, k, rows, columns, is_causal)
            top = np.maximum(m, s.max(axis=-1))
            p, shrink = np.exp(s - top[..., None]), np.exp(m - top)
            total = shrink * total + p.sum(axis=-1)
            o = shrink[..., None] * o + p @ v[..., columns, :]
            m = top
        out[..., rows, :] = o / total[..., None]
        lse[..., rows] = m + np.log(total)
    return out, lse


def backward(dout, q, k, v, out, lse, *, is_causal=False):
    """(dq, dk, dv); the weights are computed again, from the scores and lse."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    d = (dout * out).sum(axis=-1)
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    for rows in blocks(q, QUERIES):
        for columns in blocks(k, KEYS):
            p = np.exp(scores(q, k, rows, columns, is_causal) - lse[..., rows, None])
            dp = dout[..., rows, :] @ v[..., columns, :].swapaxes(-1, -2)
            ds = p * (dp - d[..., rows, None])
            dq[..., rows, :] += scale * (ds @ k[..., columns, :])
            dk[..., columns, :] += scale * (ds.swapaxes(-1, -2) @ q[..., rows, :])
            dv[..., columns, :] += p.swapaxes(-1, -2) @ dout[..., rows, :]
    return dq, dk, dv


def scores(q, k, rows, columns, is_causal):
    """One tile; -inf where a query may not look."""
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    s = scale * (q[..., rows, :] @ k[..., columns, :].swapaxes(-1, -2))
    if is_causal:
        i, j = np.arange(q.shape[-2])[rows, None], np.arange(k.shape[-2])[columns]
        s = np.where(j <= i, s, s.dtype.type(-np.inf))
    return s


def blocks(x, size):
    """Slices of the tokens of x."""
    return [slice(start, min(start + size, x.shape[-2])) for start in range(0, x.shape[-2], size)]
