"""Bahdanau, Cho and Bengio 2015, appendix A.2.2: the decoder, unrolled for one sentence, in lists of floats."""

from refattn.primitives.gru_cell import Params as GRU
from tests.definitions import additive, gru_cell


def element(args, options, where, index):
    inputs, memory, state, params = args
    n, t, last = index
    masks = [options[name] for name in ("mask", "target_mask")]
    source, target = (None if mask is None else [bool(real) for real in mask[n]] for mask in masks)
    lists = (array[n].tolist() for array in (inputs, memory, state))
    states, contexts = unroll(*lists, params, source, target, options)
    return (states if where == "states" else contexts)[t][last]


def unroll(inputs, annotations, state, params, source, target, options):
    """All states and all contexts of one sentence."""
    attention, w_c, w_h, b_h = params
    options = {"reset_after": options.get("reset_after", False), "z_weighs": options.get("z_weighs", "new")}
    allowed = [True] * len(annotations) if source is None else source
    states, contexts = [], []
    for t, gates in enumerate(inputs):
        context, _ = additive.attend(state, annotations, attention, allowed)
        fed = [
            gates[gate][j] + sum(w_c[gate, j, k] * context[k] for k in range(len(context)))
            for gate in range(3)
            for j in range(len(state))
        ]
        if target is None or target[t]:
            state = gru_cell.step(fed, state, GRU(None, w_h, None, b_h), options)
        states.append(state)
        contexts.append(context)
    return states, contexts
