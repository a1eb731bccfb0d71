"""The covariance of two channels over the pixels of one image."""


def element(args, options, where, index):
    (x,) = args
    n, a, b = index
    first, second = x[n, a].ravel().tolist(), x[n, b].ravel().tolist()
    count = len(first)
    mean_a, mean_b = sum(first) / count, sum(second) / count
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(first, second, strict=True)) / count
