"""Zhao and Wu 2019, section 3.3, equations 4 to 6, with the authors' ReLU and batch normalisation."""

import math


def element(args, options, where, index):
    x, params = args
    n, _, i, j = index
    items, _, height, width = x.shape
    everywhere = [(m, r, s) for m in range(items) for r in range(height) for s in range(width)]
    stats = options.get("stats")

    def normalised(f, p, o, given, place):
        if given is None:
            values = [f(*other) for other in everywhere]
            mean = sum(values) / len(values)
            var = sum((v - mean) ** 2 for v in values) / len(values)
        else:
            mean, var = given.mean[o], given.var[o]
        return p.gamma[o] * (f(*place) - mean) / math.sqrt(var + options["eps"]) + p.beta[o]

    def convolved(p, o, image, m, r, s):
        tall, wide = p.weight.shape[2:]
        total = p.bias[o]
        for c in range(p.weight.shape[1]):
            for a in range(tall):
                for b in range(wide):
                    row, col = r + a - tall // 2, s + b - wide // 2
                    if 0 <= row < height and 0 <= col < width:
                        total += p.weight[o, c, a, b] * image(m, c, row, col)
        return total

    def chain(name):
        (first, norm1), (second, norm2) = getattr(params, name)
        stats1, stats2 = (None, None) if stats is None else getattr(stats, name)
        cache = {}

        def hidden(m, c, r, s):
            if (m, c, r, s) not in cache:
                u = normalised(
                    lambda *p: convolved(first, c, lambda *q: x[q], *p), norm1, c, stats1, (m, r, s)
                )
                cache[m, c, r, s] = max(u, 0.0)
            return cache[m, c, r, s]

        u = normalised(lambda *p: convolved(second, 0, hidden, *p), norm2, 0, stats2, (n, i, j))
        return max(u, 0.0) if options["relu"] else u

    return 1 / (1 + math.exp(-chain("wide_tall") - chain("tall_wide")))
