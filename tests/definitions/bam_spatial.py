"""Park, Woo, Lee and Kweon 2018, section 3.1, with the blocks of the authors' code."""

import math


def element(args, options, where, index):
    x, params = args
    n, _, i, j = index
    f = logits(x, params, options["dilation"], options["stats"])
    return x[index] * (1 + 1 / (1 + math.exp(-f[n, 0, i, j])))


def logits(x, params, dilation, stats):
    """{(n, 0, i, j): f}."""
    size = len(x), *x.shape[2:]
    h = {(n, c, i, j): x[n, c, i, j] for n in range(size[0]) for c in range(x.shape[1]) for i, j in pixels(size)}
    blocks = [params.reduce, *params.dilated]
    every = [None] * len(blocks) if stats is None else [stats.reduce, *stats.dilated]
    for block, given in zip(blocks, every):
        a = convolve(h, *block.conv, dilation, size)
        for o in range(len(block.norm.gamma)):
            keys = [key for key in a if key[1] == o]
            if given is None:
                mean = sum(a[key] for key in keys) / len(keys)
                var = sum((a[key] - mean) ** 2 for key in keys) / len(keys)
            else:
                mean, var = given.mean[o], given.var[o]
            for key in keys:
                xhat = (a[key] - mean) / math.sqrt(var + 1e-5)
                a[key] = max(block.norm.gamma[o] * xhat + block.norm.beta[o], 0.0)
        h = a
    return convolve(h, *params.final, 1, size)


def convolve(h, weight, bias, dilation, size):
    outputs, inputs, rows, columns = weight.shape
    return {
        (n, o, i, j): (0.0 if bias is None else bias[o])
        + sum(
            weight[o, c, k, m] * h.get((n, c, i + dilation * (k - rows // 2), j + dilation * (m - columns // 2)), 0.0)
            for c in range(inputs)
            for k in range(rows)
            for m in range(columns)
        )
        for n in range(size[0])
        for o in range(outputs)
        for i, j in pixels(size)
    }


def pixels(size):
    return [(i, j) for i in range(size[1]) for j in range(size[2])]
