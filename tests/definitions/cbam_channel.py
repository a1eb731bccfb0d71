"""Woo, Park, Lee and Kweon 2018, equation 2; the pools lp and lse from the authors' code."""

import math

POOL = {
    "avg": lambda pixels: sum(pixels) / len(pixels),
    "max": max,
    "lp": lambda pixels: math.hypot(*pixels),
    "lse": lambda pixels: math.log(sum(math.exp(p) for p in pixels)),
}


def element(args, options, where, index):
    x, params = args
    n, c, i, j = index
    logit = 0.0
    for kind in options["pools"]:
        z = [POOL[kind]([float(p) for p in x[n, k].flat]) for k in range(x.shape[1])]
        for r in range(len(params.w1)):
            a = sum(params.w1[r, k] * z[k] for k in range(len(z)))
            logit += params.w2[c, r] * max(a if params.b1 is None else a + params.b1[r], 0.0)
        logit += 0.0 if params.b2 is None else params.b2[c]
    return x[n, c, i, j] / (1 + math.exp(-logit))
