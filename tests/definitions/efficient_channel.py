"""Wang, Wu, Zhu, Li, Zuo and Hu 2020: a gate from the nearest channels."""

import math


def element(args, options, where, index):
    x, (weight, bias) = args
    n, c, i, j = index
    _, channels, height, width = x.shape
    filter_of_c = c if len(weight) > 1 else 0
    kernel = weight.shape[1]
    e = 0.0 if bias is None else float(bias[filter_of_c])
    for k in range(kernel):
        neighbour = c + k - (kernel - 1) // 2
        if options["circular"]:
            neighbour %= channels
        if 0 <= neighbour < channels:
            mean = sum(x[n, neighbour, row, col] for row in range(height) for col in range(width)) / (height * width)
            e += weight[filter_of_c, k] * mean
    return x[n, c, i, j] / (1 + math.exp(-e))
