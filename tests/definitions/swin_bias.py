"""Liu et al. 2021, equation 4: the table laid out as (2 M - 1, 2 W - 1, H), and one pair of pixels."""


def element(args, options, where, index):
    (table,) = args
    h, query, key = index
    window = options["window"]
    m, w = window if isinstance(window, tuple) else (window, window)
    grid = table.reshape(2 * m - 1, 2 * w - 1, -1)
    dy, dx = query // w - key // w, query % w - key % w
    return grid[dy + m - 1, dx + w - 1, h]
