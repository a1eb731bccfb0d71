"""Elman 1990: the hidden layer sees the input and its own last output."""

import math


def element(args, options, where, index):
    x, h, params = args
    return step(list(x[index[0]]), list(h[index[0]]), params)[index[1]]


def step(x, h, params):
    """The new state of one item, as a list of floats."""
    w_x, w_h, b_x, b_h = params

    def net(j):
        total = sum(w_x[j, i] * x[i] for i in range(len(x))) + sum(w_h[j, k] * h[k] for k in range(len(h)))
        return total + sum(bias[j] for bias in (b_x, b_h) if bias is not None)

    return [math.tanh(net(j)) for j in range(len(h))]
