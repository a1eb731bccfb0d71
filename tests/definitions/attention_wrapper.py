"""A cell with attention and input feeding, unrolled for one sentence, in lists of floats."""

from tests.definitions import additive, multiplicative, recurrent_cell


def element(args, options, where, index):
    inputs, memory, state, params = args
    n, cells = index[0], params.cells.cells
    hidden = cells[0].w_h.shape[-1]
    annotations = memory[n].tolist()
    allowed = [options["mask"] is None or bool(options["mask"][n, s]) for s in range(len(annotations))]
    h = [[0.0] * hidden for _ in cells] if state is None else state.h[n].tolist()
    c = [[0.0] * hidden for _ in cells] if state is None or state.c is None else state.c[n].tolist()
    fed = [0.0] * (len(annotations[0]) if params.layer is None else len(params.layer.weight))
    outputs, weights = [], []
    for row in inputs[n].tolist():
        x = row + fed
        for i, cell in enumerate(cells):
            h[i], c[i] = recurrent_cell.step(x, h[i], c[i], cell, {})
            x = h[i]
        context, alignment = attend(x, annotations, params.attention, allowed, options)
        fed = context if params.layer is None else product(params.layer.weight, x + context)
        outputs.append(x if options["output"] == "cell" else fed)
        weights.append(alignment)
    found = {"outputs": outputs, "weights": weights, "attention": fed, "state.h": h, "state.c": c}[where]
    for i in index[1:]:
        found = found[i]
    return found


def attend(state, annotations, params, allowed, options):
    if hasattr(params, "u"):
        return additive.attend(state, annotations, params, allowed)
    known = {s: h for s, h in enumerate(annotations) if allowed[s]}
    shares = multiplicative.alignment(state, known, params, options["score"])
    context = [sum(share * known[s][k] for s, share in shares.items()) for k in range(len(annotations[0]))]
    return context, [shares.get(s, 0.0) for s in range(len(annotations))]


def product(matrix, vector):
    return [sum(row[j] * vector[j] for j in range(len(vector))) for row in matrix]
