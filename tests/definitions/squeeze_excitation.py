"""Hu, Shen and Sun 2018, equations 2 to 4."""

import math


def element(args, options, where, index):
    x, (w1, w2, b1, b2) = args
    n, c, i, j = index
    _, channels, height, width = x.shape
    z = [
        sum(x[n, k, row, col] for row in range(height) for col in range(width)) / (height * width)
        for k in range(channels)
    ]
    hidden = []
    for r, weights in enumerate(w1):
        a = sum(weights[k] * z[k] for k in range(channels))
        hidden.append(max(a if b1 is None else a + b1[r], 0.0))
    u = sum(w2[c, r] * h for r, h in enumerate(hidden))
    u = u if b2 is None else u + b2[c]
    return x[n, c, i, j] / (1 + math.exp(-u))
