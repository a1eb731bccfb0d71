"""Fu and others 2019, section 3.3, with the sign of the authors' code or the paper's."""

import math


def element(args, options, where, index):
    x, (gamma,) = args
    n, c, i, j = index
    channels = range(x.shape[1])
    energy = [options["sign"] * sum(a * b for a, b in zip(x[n, c].flat, x[n, d].flat)) for d in channels]
    top = max(energy)
    weight = [math.exp(e - top) for e in energy]
    return x[index] + gamma[0] * sum(weight[d] * x[n, d, i, j] for d in channels) / sum(weight)
