"""Ba, Kiros and Hinton 2016, equation 3, for all hidden units of one layer together: 80 digits."""

import itertools

import mpmath


def element(args, options, where, index):
    x, params = args
    lead, features = index[: x.ndim - options["axes"]], index[x.ndim - options["axes"] :]
    layer = itertools.product(*(range(n) for n in x.shape[len(lead) :]))
    with mpmath.workdps(80):
        a = [mpmath.mpf(x[(*lead, *f)]) for f in layer]
        mean = sum(a) / len(a)
        variance = sum((unit - mean) ** 2 for unit in a) / len(a)
        y = (mpmath.mpf(x[index]) - mean) / mpmath.sqrt(variance + options["eps"])
        if params is not None:
            y *= params.gamma[features]
            y += 0 if params.beta is None else params.beta[features]
        return complex(y)
