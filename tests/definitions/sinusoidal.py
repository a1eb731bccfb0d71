"""Vaswani et al. 2017, section 3.5, for one feature of one token."""

import math


def element(args, options, where, index):
    (x,) = args
    b, t, d = index
    half = x.shape[-1] // 2
    if options["layout"] == "interleaved":
        wave, cosine = divmod(d, 2)
    else:
        cosine, wave = divmod(d, half)
    steps = half if options["frequencies"] == "exclusive" else max(half - 1, 1)
    position = t if options["positions"] is None else int(options["positions"][b, t])
    angle = position / options["base"] ** (wave / steps)
    return options["scale"] * x[index] + (math.cos(angle) if cosine else math.sin(angle))
