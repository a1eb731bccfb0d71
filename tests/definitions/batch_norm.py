"""Ioffe and Szegedy 2015, algorithm 1; at inference with the statistics given (algorithm 2, line 11)."""

import itertools
import math


def element(args, options, where, index):
    x, params = args
    c = index[1]
    if "stats" in options:
        mean, var = (s[c] for s in options["stats"])
    else:
        values = [x[(n, c, *s)] for n in range(len(x)) for s in itertools.product(*map(range, x.shape[2:]))]
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
    xhat = (x[index] - mean) / math.sqrt(var + options.get("eps", 1e-5))
    return xhat if params is None else params.gamma[c] * xhat + params.beta[c]
