"""Yang, Zhang, Li and Xie 2021: the gate is the sigmoid of one over the minimal energy."""

import math


def element(args, options, where, index):
    (x,) = args
    n, c, i, j = index
    pixels = [float(value) for row in x[n, c] for value in row]
    mean = sum(pixels) / len(pixels)
    variance = sum((p - mean) ** 2 for p in pixels) / (len(pixels) - options["unbiased"])
    t = float(x[n, c, i, j])
    energy = 4 * (variance + options["lam"]) / ((t - mean) ** 2 + 2 * variance + 2 * options["lam"])
    return t / (1 + math.exp(-1 / energy))
