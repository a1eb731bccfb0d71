"""Luong, Pham and Manning 2015, section 2: the source is read from its end, and the decoder starts from there."""

from tests.definitions import gru_cell, lstm_cell
from tests.definitions.luong_decoder import decode


def element(args, options, where, index):
    source, target, (encoder, decoder) = args
    n, lengths = index[0], options.get("lengths")
    words = [list(source[n, s]) for s in range(source.shape[1] if lengths is None else lengths[n])]
    hidden, h, c, read = len(decoder.cells.cells[0].w_h[0]), [], [], words[::-1]
    for cell in encoder.cells:
        lstm = len(cell.w_h) == 4
        state, memory, read_by_next = [0.0] * hidden, [0.0] * hidden if lstm else None, []
        for x in read:
            if lstm:
                state, memory = lstm_cell.step(x, state, memory, cell)
            else:
                state = gru_cell.step(x, state, cell, {})
            read_by_next.append(state)
        h, c, read = [*h, state], [*c, memory], read_by_next
    rows = [list(target[n, t]) for t in range(target.shape[1])]
    attentional, h, c = decode(rows, read[::-1], h, c, decoder, options, hidden)
    return {"attentional": attentional, "state.h": h, "state.c": c}[where][index[1]][index[2]]
