"""Wu and He 2018, equations 1, 2, 3 and 7: 80 digits."""

import itertools

import mpmath


def element(args, options, where, index):
    x, params = args
    n, c, *_ = index
    per_group = x.shape[1] // options["groups"]
    group = [other for other in range(x.shape[1]) if other // per_group == c // per_group]
    with mpmath.workdps(80):
        space = list(itertools.product(*(range(size) for size in x.shape[2:])))
        a = [mpmath.mpf(x[(n, k, *s)]) for k in group for s in space]
        mean = sum(a) / len(a)
        std = mpmath.sqrt(sum((number - mean) ** 2 for number in a) / len(a) + options["eps"])
        y = (mpmath.mpf(x[index]) - mean) / std
        return complex(y if params is None else params.gamma[c] * y + params.beta[c])
