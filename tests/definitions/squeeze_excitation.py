"""Hu, Shen and Sun 2018, equations 2 to 4."""

import math


def element(args, options, where, index):
    x, (w1, b1, w2, b2) = args
    n, c, i, j = index
    _, channels, height, width = x.shape
    z = [
        sum(x[n, k, row, col] for row in range(height) for col in range(width)) / (height * width)
        for k in range(channels)
    ]
    hidden = [max(b1[r] + sum(w1[r, k] * z[k] for k in range(channels)), 0.0) for r in range(len(b1))]
    u = b2[c] + sum(w2[c, r] * hidden[r] for r in range(len(b1)))
    return x[n, c, i, j] / (1 + math.exp(-u))
