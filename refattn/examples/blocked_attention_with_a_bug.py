"""The kernel of blocked_attention.py with one bug, that of many a first attempt. `refattn check` finds it.

When a block of keys holds a larger score than all before it, the sum of exponentials shrinks, but the sum of weighted
values does not. As long as one tile holds all keys, or the largest score comes early, everything is right.
"""

import numpy as np

from refattn.examples.blocked_attention import KEYS, QUERIES, backward, blocks, scores

__all__ = ["backward", "forward"]


def forward(q, k, v, *, is_causal=False):
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
            o = o + p @ v[..., columns, :]  # the bug: shrink[..., None] * o + ...
            m = top
        out[..., rows, :] = o / total[..., None]
        lse[..., rows] = m + np.log(total)
    return out, lse
