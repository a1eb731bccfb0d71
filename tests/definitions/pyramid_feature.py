"""Zhao and Wu 2019, figure 2 and section 3, with the authors' batch normalisations, on lists of numbers.

A map is a list of items, of channels, of rows, of pixels.
"""

import math


def element(args, options, where, index):
    *features, params = args
    c1, c2, c3, c4, c5 = (image.tolist() for image in features)
    n, o, i, j = index
    stats, eps = options.get("stats"), options["eps"]

    def norm(x, p, given):
        values = [[v for item in x for row in item[c] for v in row] for c in range(len(x[0]))]
        if given is None:
            means = [sum(v) / len(v) for v in values]
            variances = [sum((a - m) ** 2 for a in v) / len(v) for v, m in zip(values, means)]
        else:
            means, variances = given
        stretch = [g / math.sqrt(v + eps) for g, v in zip(p.gamma, variances)]
        return _each(x, lambda a, c: stretch[c] * (a - means[c]) + p.beta[c])

    def block(x, p, given, relu=True):
        y = norm(_conv(x, p.conv), p.norm, given)
        return _each(y, lambda a, _: max(a, 0.0)) if relu else y

    def given(name):
        return None if stats is None else getattr(stats, name)

    def context(x, name):
        p = getattr(params, name)
        branches = [_conv(x, branch, dilation) for branch, dilation in zip(p.branches, (1, 3, 5, 7))]
        return _each(norm(_join(*branches), p.norm, given(name)), lambda a, _: max(a, 0.0))

    def chain(x, name):
        first, second = (None, None) if stats is None else getattr(stats.spatial, name)
        p = getattr(params.spatial, name)
        return block(block(x, p.first, first), p.second, second, options["relu"])

    pyramid = _join(context(c3, "context3"), _up(context(c4, "context4"), 2), _up(context(c5, "context5"), 4))
    attended = [_channel_attention(item, params.channel) for item in pyramid]
    high = _up(block(attended, params.high, given("high")), 4)
    l2 = _up(block(c2, params.low2, given("low2")), 2)
    low = block(_join(block(c1, params.low1, given("low1")), l2), params.low, given("low"))
    one, other = chain(high, "wide_tall"), chain(high, "tall_wide")

    def gate(m, r, s):
        return 1 / (1 + math.exp(-one[m][0][r][s] - other[m][0][r][s]))

    gated = [
        [[[gate(m, r, s) * a for s, a in enumerate(row)] for r, row in enumerate(channel)] for channel in item]
        for m, item in enumerate(low)
    ]
    return _conv(_join(gated, high), params.out)[n][o][i][j]


def _each(x, function):
    """function(value, channel) everywhere."""
    return [[[[function(a, c) for a in row] for row in channel] for c, channel in enumerate(item)] for item in x]


def _join(*maps):
    return [[channel for item in items for channel in item] for items in zip(*maps)]


def _conv(x, p, dilation=1):
    weight, bias = p.weight.tolist(), [0.0] * len(p.weight) if p.bias is None else p.bias
    height, width, tall, wide = len(x[0][0]), len(x[0][0][0]), len(weight[0][0]), len(weight[0][0][0])

    def pixel(item, o, i, j):
        total = bias[o]
        for a in range(tall):
            for b in range(wide):
                r, s = i + dilation * (a - tall // 2), j + dilation * (b - wide // 2)
                if 0 <= r < height and 0 <= s < width:
                    total += sum(weight[o][c][a][b] * item[c][r][s] for c in range(len(item)))
        return total

    return [
        [[[pixel(item, o, i, j) for j in range(width)] for i in range(height)] for o in range(len(weight))]
        for item in x
    ]


def _up(x, factor):
    height, width = len(x[0][0]), len(x[0][0][0])

    def between(values, t):
        """The value at position t (n - 1) / (factor n - 1) of n values."""
        place = t * (len(values) - 1) / max(factor * len(values) - 1, 1)
        below = min(int(place), len(values) - 1)
        above = min(below + 1, len(values) - 1)
        return (1 - place + below) * values[below] + (place - below) * values[above]

    def pixel(channel, i, j):
        return between([between(row, j) for row in channel], i)

    return [
        [[[pixel(channel, i, j) for j in range(factor * width)] for i in range(factor * height)] for channel in item]
        for item in x
    ]


def _channel_attention(item, p):
    means = [sum(map(sum, channel)) / (len(channel) * len(channel[0])) for channel in item]
    hidden = [max(b + sum(w * z for w, z in zip(row, means)), 0.0) for row, b in zip(p.w1, p.b1)]
    gates = [1 / (1 + math.exp(-b - sum(w * h for w, h in zip(row, hidden)))) for row, b in zip(p.w2, p.b2)]
    return [[[gate * a for a in row] for row in channel] for gate, channel in zip(gates, item)]
