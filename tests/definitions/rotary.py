"""Su et al. 2021, equation 34, for one feature: its pair is a complex number, multiplied by cos + i sin."""


def element(args, options, where, index):
    x, cos, sin = args
    b, *heads, t, d = index
    pairs, pairing = cos.shape[-1], options["pairing"]
    if d >= 2 * pairs:
        return x[index]
    pair, second = divmod(d, 2) if pairing == "interleaved" else (d % pairs, d // pairs)
    both = (pair, pair + pairs) if pairing == "half" else (2 * pair, 2 * pair + 1)
    z = complex(*(x[(b, *heads, t, feature)] for feature in both))
    turned = z * complex(cos[b, t, pair], sin[b, t, pair])
    return turned.imag if second else turned.real
