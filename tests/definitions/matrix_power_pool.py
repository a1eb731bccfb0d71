"""Li et al. 2018: an entry of the root of the covariance, found by its place in the triangle."""

from tests.definitions.matrix_sqrt import root


def element(args, options, where, index):
    (x,) = args
    n, place = index
    channels = [x[n, c].ravel().tolist() for c in range(x.shape[1])]
    count = len(channels[0])
    centred = [[p - sum(channel) / count for p in channel] for channel in channels]
    covariance = [[sum(p * q for p, q in zip(a, b, strict=True)) / count for b in centred] for a in centred]
    triangle = [(i, j) for i in range(len(channels)) for j in range(i, len(channels))]
    i, j = triangle[place]
    return root(covariance, options["iterations"])[i][j]
