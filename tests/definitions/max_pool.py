"""The largest pixel that the window sees."""

import itertools


def element(args, options, where, index):
    (x,) = args
    n, c, *t = index
    kernel, padding, dilation = options["kernel"], options["padding"], options["dilation"]
    stride = kernel if options["stride"] is None else [options["stride"]] * len(kernel)
    seen = []
    for k in itertools.product(*map(range, kernel)):
        s = [step * i + d * j - pad for step, i, d, j, pad in zip(stride, t, dilation, k, padding)]
        if all(0 <= at < length for at, length in zip(s, x.shape[2:])):
            seen.append(x[(n, c, *s)])
    return max(seen)
