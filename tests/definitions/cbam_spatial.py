"""Woo, Park, Lee and Kweon 2018, equation 3, and the batch normalisation of the authors' code."""

import itertools
import math


def element(args, options, where, index):
    x, (weight, norm) = args
    n, c, i, j = index
    batch, channels, height, width = x.shape
    rows, cols = weight.shape[2:]

    def pixel(kind, n, i, j):
        if not (0 <= i < height and 0 <= j < width):
            return 0.0
        values = [x[n, k, i, j] for k in range(channels)]
        return max(values) if kind == "max" else sum(values) / channels

    def logit(n, i, j):
        return sum(
            weight[0, m, row, col] * pixel(kind, n, i + row - rows // 2, j + col - cols // 2)
            for m, kind in enumerate(options["maps"])
            for row in range(rows)
            for col in range(cols)
        )

    f = logit(n, i, j)
    if norm is not None:
        if options["stats"] is not None:
            mean, var = (float(s[0]) for s in options["stats"])
        else:
            every = [logit(*at) for at in itertools.product(range(batch), range(height), range(width))]
            mean = sum(every) / len(every)
            var = sum((e - mean) ** 2 for e in every) / len(every)
        f = norm.gamma[0] * (f - mean) / math.sqrt(var + 1e-5) + norm.beta[0]
    return x[n, c, i, j] / (1 + math.exp(-f))
