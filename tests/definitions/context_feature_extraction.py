"""Zhao and Wu 2019, section 3.1, figure 3."""

import math


def element(args, options, where, index):
    x, params = args
    n, m, i, j = index
    height, width = x.shape[2:]
    filters = params.branches[0].weight.shape[0]
    weight, dilation = params.branches[m // filters].weight, options["dilations"][m // filters]
    middle = weight.shape[2] // 2

    def feature(item, row, col):
        total = 0.0
        for c in range(x.shape[1]):
            for p in range(weight.shape[2]):
                for q in range(weight.shape[3]):
                    r, s = row + dilation * (p - middle), col + dilation * (q - middle)
                    if 0 <= r < height and 0 <= s < width:
                        total += weight[m % filters, c, p, q] * x[item, c, r, s]
        return total

    if options.get("stats") is None:
        values = [feature(k, r, s) for k in range(x.shape[0]) for r in range(height) for s in range(width)]
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
    else:
        mean, var = options["stats"].mean[m], options["stats"].var[m]
    u = params.norm.gamma[m] * (feature(n, i, j) - mean) / math.sqrt(var + options["eps"]) + params.norm.beta[m]
    return max(u, 0.0)
