"""The value at a point of the image: every pixel weighted by a triangle around its centre, axis by axis."""


def element(args, options, where, index):
    (x,) = args
    n, c, *position = index
    size = options["size"]
    sizes = size if isinstance(size, tuple) else (size, size)
    weights = []
    for t, length, outputs in zip(position, x.shape[2:], sizes):
        if options["align_corners"]:
            point = t * (length - 1) / (outputs - 1) if outputs > 1 else 0.0
        else:
            point = (t + 0.5) * length / outputs - 0.5
        point = min(max(point, 0.0), length - 1.0)
        weights.append([max(0.0, 1.0 - abs(point - s)) for s in range(length)])
    rows, columns = weights
    return sum(a * b * x[n, c, h, w] for h, a in enumerate(rows) for w, b in enumerate(columns))
