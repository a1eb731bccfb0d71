"""Fu et al. 2019, equations 1 and 2."""

import math


def element(args, options, where, index):
    x, (query, key, value, gamma) = args
    n, c, row, col = index
    pixels = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]

    def feature(p, o, i, j):
        return (0 if p.bias is None else p.bias[o]) + sum(p.weight[o, d] * x[n, d, i, j] for d in range(x.shape[1]))

    def score(i, j):
        return sum(feature(query, o, row, col) * feature(key, o, i, j) for o in range(len(key.weight)))

    scores = {pixel: score(*pixel) for pixel in pixels}
    top = max(scores.values())
    likeness = {pixel: math.exp(s - top) for pixel, s in scores.items()}
    mean = sum(w * feature(value, c, *pixel) for pixel, w in likeness.items()) / sum(likeness.values())
    return x[n, c, row, col] + gamma[0] * mean
