"""Hochreiter and Schmidhuber 1997, with the forget gate of Gers, Schmidhuber and Cummins 2000."""

import math


def element(args, options, where, index):
    x, (h, c), params = args
    new_h, new_c = step(list(x[index[0]]), list(h[index[0]]), list(c[index[0]]), params)
    return (new_h if where == "h" else new_c)[index[1]]


def step(x, h, c, params):
    """The new state of one item: two lists of floats."""
    w_x, w_h, b_x, b_h = params

    def net(gate, j):
        total = sum(w_x[gate, j, i] * x[i] for i in range(len(x)))
        total += sum(w_h[gate, j, k] * h[k] for k in range(len(h)))
        return total + sum(bias[gate, j] for bias in (b_x, b_h) if bias is not None)

    def logistic(a):
        return 1 / (1 + math.exp(-a))

    cell = [
        logistic(net(1, j)) * c[j] + logistic(net(0, j)) * math.tanh(net(2, j))  # forget what was, take in what is new
        for j in range(len(h))
    ]
    return [logistic(net(3, j)) * math.tanh(cell[j]) for j in range(len(h))], cell
