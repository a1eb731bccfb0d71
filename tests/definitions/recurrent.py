"""A recurrent layer, unrolled by hand for one sequence, in lists of floats."""

from tests.definitions import recurrent_cell


def element(args, options, where, index):
    x, state, (cells,) = args
    n = index[0]
    steps, hidden = range(x.shape[1]), cells[0].w_h.shape[-1]
    ways = {"forward": ["ltr"], "backward": ["rtl"], "both": ["ltr", "rtl"]}[options["direction"]]
    present = [options["mask"] is None or bool(options["mask"][n, t]) for t in steps]
    sequence, finals = [list(x[n, t]) for t in steps], []
    for bottom in range(0, len(cells), len(ways)):
        read, sequence = sequence, [[] for _ in steps]
        for offset, way in enumerate(ways):
            i = bottom + offset
            h = [0.0] * hidden if state is None else list(state.h[n, i])
            c = [0.0] * hidden if state is None or state.c is None else list(state.c[n, i])
            for t in steps if way == "ltr" else reversed(steps):
                if present[t]:
                    h, c = recurrent_cell.step(read[t], h, c, cells[i], options)
                silent = not present[t] and options["padded"] == "zero"
                sequence[t] = sequence[t] + ([0.0] * hidden if silent else h)
            finals.append((h, c))
    if where == "y":
        return sequence[index[1]][index[2]]
    return finals[index[1]][0 if where == "state.h" else 1][index[2]]
