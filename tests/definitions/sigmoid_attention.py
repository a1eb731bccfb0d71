"""Ramapuram et al. 2024, section 2, for one query and one feature of its value."""

import math


def element(args, options, where, index):
    q, k, v, bias = args
    *lead, i, e = index
    features, keys = q.shape[-1], k.shape[-2]
    scale = options["scale"] or features**-0.5
    b = -math.log(keys) if bias is None else float(bias[tuple(lead[1:])])
    y = 0.0
    for j in range(keys):
        if options["mask"] is not None and not options["mask"][(*lead, i, j)]:
            continue
        if options["is_causal"] and j > i:
            continue
        s = scale * sum(q[(*lead, i, d)] * k[(*lead, j, d)] for d in range(features)) + b
        y += (1 + math.tanh(s / 2)) / 2 * v[(*lead, j, e)]
    return y
