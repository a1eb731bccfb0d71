"""Elman 1990: the hidden layer sees the input and its own last output."""

import math


def element(args, options, where, index):
    x, h, (w_x, w_h, b_x, b_h) = args
    n, j = index
    a = sum(w_x[j, i] * x[n, i] for i in range(x.shape[1])) + sum(w_h[j, k] * h[n, k] for k in range(h.shape[1]))
    for bias in (b_x, b_h):
        a += 0.0 if bias is None else bias[j]
    return math.tanh(a)
