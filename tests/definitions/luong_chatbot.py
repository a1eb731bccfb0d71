"""The PyTorch chatbot tutorial's encoder and decoder, one dialogue at a time, in lists of floats."""

import math

from tests.definitions import gru_cell, lstm_cell
from tests.definitions.luong_decoder import decode


def element(args, options, where, index):
    (table, encoder, decoder, word) = args[0]
    n, source, target = index[0], options["source"], options["target"]
    length = source.shape[1] if options["lengths"] is None else int(options["lengths"][n])
    layers, hidden = len(decoder.cells.cells), len(encoder.cells[0].w_h[0])
    read, h, c = [list(table[source[n, s]]) for s in range(length)], [], []
    for layer in range(layers):
        ways = []
        for cell, words in zip(encoder.cells[2 * layer : 2 * layer + 2], (read, read[::-1]), strict=True):
            states, last_h, last_c = _scan(words, cell, hidden)
            ways.append(states)
            h, c = [*h, last_h], [*c, last_c]
        read = [forward + backward for forward, backward in zip(ways[0], ways[1][::-1], strict=True)]
    memory = [[m[k] + m[hidden + k] for k in range(hidden)] for m in read]
    if not options["mask_padding"]:
        memory += [[0.0] * hidden for _ in range(source.shape[1] - length)]
    rows = [list(table[target[n, t]]) for t in range(target.shape[1])]
    reading = {"score": options["score"], "feed": False}
    attentional, h, c = decode(rows, memory, h[:layers], c[:layers], decoder, reading, hidden)
    if where != "probabilities":
        return {"state.h": h, "state.c": c}[where][index[1]][index[2]]
    a, (w, b) = attentional[index[1]], word
    logits = [b[v] + sum(w[v, i] * a[i] for i in range(len(a))) for v in range(len(b))]
    return 1 / sum(math.exp(other - logits[index[2]]) for other in logits)


def _scan(words, cell, hidden):
    h, c, states = [0.0] * hidden, [0.0] * hidden if len(cell.w_h) == 4 else None, []
    for x in words:
        if c is None:
            h = gru_cell.step(x, h, cell, {})
        else:
            h, c = lstm_cell.step(x, h, c, cell)
        states.append(h)
    return states, h, c
