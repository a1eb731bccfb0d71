"""y_nop = b_o + sum_ik W_oik x_n,i,stride p + dilation k - padding, the sum over pixels that exist."""

import itertools


def element(args, options, where, index):
    x, (weight, bias) = args
    n, o, *p = index
    outputs, per_group, *kernel = weight.shape
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    first = o // (outputs // options["groups"]) * per_group  # the first channel of o's group
    total = 0.0 if bias is None else bias[o]
    for i in range(per_group):
        for k in itertools.product(*map(range, kernel)):
            s = [stride * t + d * j - pad for t, j, d, pad in zip(p, k, dilation, padding)]
            if all(0 <= at < length for at, length in zip(s, x.shape[2:])):
                total += weight[(o, i, *k)] * x[(n, first + i, *s)]
    return total
