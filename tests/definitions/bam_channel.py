"""Park, Woo, Lee and Kweon 2018, section 3.1, with the hidden layers of the authors' code."""

import math


def element(args, options, where, index):
    x, params = args
    n, c, i, j = index
    return x[n, c, i, j] * (1 + 1 / (1 + math.exp(-logits(x, params, options["pool"], options["stats"])[n][c])))


def logits(x, params, pool, stats):
    """[[c of every channel] of every image]."""
    batch, channels, height, width = x.shape
    seen = width if pool == "global" else height
    h = [
        [sum(x[n, c, i, j] for i in range(height) for j in range(seen)) / (height * seen) for c in range(channels)]
        for n in range(batch)
    ]
    for number, ((weight, bias), (gamma, beta)) in enumerate(params.hidden):
        a = [affine(weight, bias, row) for row in h]
        for m in range(len(gamma)):
            if stats is None:
                mean = sum(row[m] for row in a) / batch
                var = sum((row[m] - mean) ** 2 for row in a) / batch
            else:
                mean, var = (s[m] for s in stats.hidden[number])
            for row in a:
                row[m] = max(gamma[m] * (row[m] - mean) / math.sqrt(var + 1e-5) + beta[m], 0.0)
        h = a
    return [affine(*params.final, row) for row in h]


def affine(weight, bias, vector):
    rows = range(len(weight))
    return [(bias[o] if bias is not None else 0.0) + sum(w * v for w, v in zip(weight[o], vector)) for o in rows]
