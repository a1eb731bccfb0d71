"""Heo et al. 2024, with any number of axes: a pair is a complex number, turned by exp(i angle)."""

import cmath


def element(args, options, where, index):
    x, frequencies = args
    b, h, t, d = index
    axes, _, pairs = frequencies.shape
    pairing = options["pairing"]
    if d >= 2 * pairs:
        return x[index]
    pair, second = divmod(d, 2) if pairing == "interleaved" else (d % pairs, d // pairs)
    both = (pair, pair + pairs) if pairing == "half" else (2 * pair, 2 * pair + 1)
    angle = sum(options["coordinates"][b, t, a] * frequencies[a, h, pair] for a in range(axes))
    z = complex(*(x[b, h, t, feature] for feature in both)) * cmath.exp(1j * angle)
    return z.imag if second else z.real
