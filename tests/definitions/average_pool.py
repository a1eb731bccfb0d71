"""The mean of the pixels that the window sees, or their sum divided by its size."""

import itertools
import math


def element(args, options, where, index):
    (x,) = args
    n, c, *t = index
    kernel, padding = options["kernel"], options["padding"]
    stride = kernel if options["stride"] is None else [options["stride"]] * len(kernel)
    seen = []
    for k in itertools.product(*map(range, kernel)):
        s = [step * i + j - pad for step, i, j, pad in zip(stride, t, k, padding)]
        if all(0 <= at < length for at, length in zip(s, x.shape[2:])):
            seen.append(x[(n, c, *s)])
    return sum(seen) / (math.prod(kernel) if options["count_include_pad"] else len(seen))
