"""Vaswani et al. 2017, equation 2: FFN(x) = max(0, x W1 + b1) W2 + b2; Hendrycks and Gimpel 2016 for gelu."""

import mpmath

ACTIVATION = {
    "relu": lambda a: max(a, 0),
    "gelu": lambda a: a * mpmath.ncdf(a),
    "gelu_tanh": lambda a: a / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (a + 0.044715 * a**3))),
}


def element(args, options, where, index):
    x, ((w1, b1), (w2, b2)) = args
    *lead, o = index
    y = 0 if b2 is None else b2[o]
    for m in range(w1.shape[0]):
        a = 0 if b1 is None else b1[m]
        for d in range(x.shape[-1]):
            a += w1[m, d] * x[(*lead, d)]
        keep = 1 if options["dropout"] is None else options["dropout"][(*lead, m)]
        y += w2[o, m] * ACTIVATION[options["activation"]](mpmath.mpf(a)) * keep
    return complex(y)
