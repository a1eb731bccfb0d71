"""Touvron et al. 2021, equations 2 to 5: CA(Q, K, V) with Q of the class embedding, one number of it."""

import math


def element(args, options, where, index):
    x, params = args
    b, _, o = index

    def row(projection, r, t):
        weight, bias = projection
        total = 0.0 if bias is None else bias[r]
        for c in range(x.shape[2]):
            total += weight[r, c] * x[b, t, c]
        return total

    joined, heads = [], options["heads"]
    compared, passed = len(params.q.weight) // heads, len(params.v.weight) // heads
    for h in range(heads):
        scores = [
            sum(row(params.q, r, 0) * row(params.k, r, t) for r in range(h * compared, (h + 1) * compared))
            for t in range(x.shape[1])
        ]
        a = [math.exp(s / math.sqrt(compared)) for s in scores]
        for r in range(h * passed, (h + 1) * passed):
            joined.append(sum(weight * row(params.v, r, t) for t, weight in enumerate(a)) / sum(a))
    y = sum(w * z for w, z in zip(params.out.weight[o], joined))
    return y if params.out.bias is None else y + params.out.bias[o]
