"""y_m = max over the pieces of unit m"""


def element(args, options, where, index):
    (x,) = args
    *lead, m = index
    pieces = options["pieces"]
    return max(x[(*lead, p)] for p in range(pieces * m, pieces * m + pieces))
