"""FlashInfer's section 2.2, in 50 digits: every part gives back its sum of e^score v, and its sum of e^score."""

import mpmath


def element(args, options, where, index):
    outputs, lses = args
    b, h, i = index[:3]
    with mpmath.workdps(50):
        numerator, denominator = mpmath.mpf(0), mpmath.mpf(0)
        for part, lse in zip(outputs, lses):
            if lse[b, h, i] == float("-inf"):
                continue
            mass = mpmath.exp(mpmath.mpf(lse[b, h, i]))
            denominator += mass
            if where == "y":
                numerator += mass * mpmath.mpf(part[index])
        return complex(mpmath.log(denominator) if where == "lse" else numerator / denominator)
