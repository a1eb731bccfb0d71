"""Sun et al. 2023, algorithm 1: a pair of features is a complex number, and the embedding multiplies it by another."""

import cmath


def element(args, options, where, index):
    (x,) = args
    *lead, d = index
    features, pairing = x.shape[-1], options["pairing"]
    half = features // 2
    pair, second = divmod(d, 2) if pairing == "interleaved" else (d % half, d // half)
    both = (pair, pair + half) if pairing == "half" else (2 * pair, 2 * pair + 1)
    position = int(options["positions"][lead[0], lead[-1]])
    zeta = (pair / half + 0.4) / 1.4
    decay = zeta ** (position / options["scale_base"])
    turn = cmath.exp(1j * position * options["base"] ** (-pair / half))
    z = complex(*(x[(*lead, feature)] for feature in both)) * turn * (1 / decay if options["is_key"] else decay)
    return z.imag if second else z.real
