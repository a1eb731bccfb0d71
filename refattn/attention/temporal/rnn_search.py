r"""RNNsearch: encoder and decoder with additive attention.

A GRU reads the source in both directions; at each target word another GRU looks at what it read, and predicts the word
that follows.

Paper: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015
(arXiv:1409.0473), section 3 and appendix A.2.

Shapes
    N sentences of at most S source and T target words; U words in the source vocabulary, V in the target vocabulary;
    E and F features of a source and a target word; H hidden units, K features of an encoder state, 2 M maxout units.

Forward
    x, y     = rows source and target of their tables            see embedding
    h, last  = recurrent(x)                                      encoder states, and the state it ends in
    s_-1     = tanh(W_s last + b)                                last itself where params.start is None
    s, c     = additive_decoder(W y + b, h, s_-1)
    o_t      = maxout(W_o [s_t-1; y_t; c_t] + b)                 s_t where params.deep is None
    l_t      = log softmax of W_v o_t + b                        log probabilities of the next word

Backward, with a bar for "gradient of the loss with respect to"
    obar         = through log softmax and W_v
    s_t-1bar, y_tbar, c_tbar = through maxout and W_o            s_tbar = o_tbar where deep is None
    s_T-1bar    += statebar                                      the last state is an output too
    hbar, more of ybar and of s_-1bar from the decoder's backward, and W
    lastbar      = s_-1bar (1 - s_-1^2) W_s                      s_-1bar where start is None
    xbar         = from the encoder's backward at hbar and lastbar
    the tables' gradients: xbar added up by source, ybar added up by target

Choices
    The encoder has one layer: two cells read in both directions, h = [forward; backward] and last is the backward
    state at the first word, as in the paper; one cell reads forward, and last is the state at the last word, as in the
    PyTorch tutorial, which has neither start nor deep. gru="torch" is its GRU: see gru_cell for both.
    Padding is not attended to, and states wait there; the tutorial has no padding. target is what the decoder reads:
    the translation, with a start symbol in front and without its last word.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.temporal import additive_decoder
from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped, tree_map
from refattn.primitives import embedding, gru_cell, linear, log_softmax, maxout, recurrent

GRUS = {
    "paper": {"reset_after": False, "z_weighs": "new"},
    "torch": {"reset_after": True, "z_weighs": "old"},
}


class Params(NamedTuple):
    source: Shaped[Array, "U E"]
    encoder: recurrent.Params
    target: Shaped[Array, "V F"]
    read: Shaped[linear.Params, "O=G I=F"]  # G = 3 H, the gates in the order r, z, n
    decoder: Shaped[additive_decoder.Params, "H=H K=K"]
    word: Shaped[linear.Params, "O=V I=O"]
    start: Shaped[linear.Params, "O=H I=D"] | None = None
    deep: linear.Params | None = None


class Out(NamedTuple):
    log_probabilities: Shaped[Array, "N T V"]
    state: Shaped[Array, "N H"]  # after the last step


class Saved(NamedTuple):
    weights: Shaped[Array, "N T S"]
    source: embedding.Saved
    encoded: recurrent.Saved
    started: linear.Saved | None
    target: embedding.Saved
    read: linear.Saved
    decoded: additive_decoder.Saved
    states: Shaped[Array, "N R H"]  # s_-1, s_0, ..., R = T + 1
    deep: tuple | None  # linear.Saved, maxout.Saved
    word: linear.Saved
    logs: log_softmax.Saved


def init(rng, source, target, features, hidden, units, *, maxout=None, directions=2):
    """Normal tables, the rest as the parts' own init. source, target: U, V; features: E = F; maxout: M, or no deep."""
    direction, memory = "both" if directions == 2 else "forward", directions * hidden
    return Params(
        source=rng.normal(size=(source, features)),
        encoder=recurrent.init(rng, features, hidden, direction=direction),
        target=rng.normal(size=(target, features)),
        read=linear.init(rng, features, 3 * hidden),
        decoder=additive_decoder.init(rng, memory, hidden, units),
        word=linear.init(rng, maxout or hidden, target),
        start=linear.init(rng, hidden, hidden) if directions == 2 else None,
        deep=None if maxout is None else linear.init(rng, hidden + features + memory, 2 * maxout),
    )


@shaped
def forward(
    params: Params,
    *,
    source: Shaped[Ints, "N S"],
    target: Shaped[Ints, "N T"],
    lengths: Shaped[Ints, "N"] | None = None,
    target_lengths: Shaped[Ints, "N"] | None = None,
    gru: str = "paper",
) -> tuple[Out, Saved]:
    _check(params, source, target, lengths, target_lengths, gru)
    mask, target_mask = _mask(lengths, source), _mask(target_lengths, target)
    hidden, both = params.decoder.w_h.shape[1], len(params.encoder.cells) == 2

    x, sourced = embedding.forward(params.source, ids=source)
    options = {"direction": "both" if both else "forward", "mask": mask, **GRUS[gru]}
    (h, ends), encoded = recurrent.forward(x, None, params.encoder, **options)
    state, started = ends.h[:, -1], None
    if params.start is not None:
        a, started = linear.forward(state, params.start)
        state = np.tanh(a)

    y, targeted = embedding.forward(params.target, ids=target)
    gates, read = linear.forward(y, params.read)
    options = {"mask": mask, "target_mask": target_mask, **GRUS[gru]}
    inputs = gates.reshape(*target.shape, 3, hidden)
    (states, contexts), decoded = additive_decoder.forward(inputs, h, state, params.decoder, **options)
    states = np.concatenate([state[:, None], states], axis=1)

    o, deep = states[:, 1:], None
    if params.deep is not None:
        pieces, mixed = linear.forward(np.concatenate([states[:, :-1], y, contexts], axis=2), params.deep)
        o, largest = maxout.forward(pieces)
        deep = mixed, largest
    scores, word = linear.forward(o, params.word)
    logs, normalised = log_softmax.forward(scores)
    saved = Saved(
        decoded.weights, sourced, encoded, started, targeted, read, decoded, states, deep, word, normalised
    )
    return Out(logs, states[:, -1]), saved


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Params]:
    _, sourced, encoded, started, targeted, read, decoded, states, deep, word, normalised = saved
    (dscores,) = log_softmax.backward(dout.log_probabilities, normalised)
    do, dword = linear.backward(dscores, word)

    dstates = np.zeros(states.shape, do.dtype)
    if deep is None:
        dstates[:, 1:], dy, dcontexts, ddeep = do, 0, np.zeros_like(decoded.contexts), None
    else:
        mixed, largest = deep
        (dpieces,) = maxout.backward(do, largest)
        dmixed, ddeep = linear.backward(dpieces, mixed)
        hidden, features = states.shape[2], read.x.shape[2]
        dstates[:, :-1], dy, dcontexts = np.split(dmixed, [hidden, hidden + features], axis=2)
    dstates[:, -1] += dout.state

    ddecoded = additive_decoder.Out(dstates[:, 1:], dcontexts)
    dinputs, dh, dstate, ddecoder = additive_decoder.backward(ddecoded, decoded)
    dgates, dread = linear.backward(dinputs.reshape(*do.shape[:2], -1), read)
    (dtarget,) = embedding.backward(dy + dgates, targeted)

    dstate, dstart = dstate + dstates[:, 0], None
    if started is not None:
        dstate, dstart = linear.backward(dstate * (1 - states[:, 0] * states[:, 0]), started)
    dends = np.zeros((len(dstate), len(encoded.scans), dstate.shape[1]), dstate.dtype)
    dends[:, -1] = dstate
    dx, _, dencoder = recurrent.backward(recurrent.Out(dh, recurrent.State(dends)), encoded)
    (dsource,) = embedding.backward(dx, sourced)
    return (Params(dsource, dencoder, dtarget, dread, ddecoder, dword, dstart, ddeep),)


def _mask(lengths, words):
    return None if lengths is None else np.arange(words.shape[1]) < lengths[:, None]


def _check(params, source, target, lengths, target_lengths, gru):
    where, cells = "rnn_search.forward:", params.encoder.cells
    expect(gru in GRUS, f"{where} gru", gru, f"one of {tuple(GRUS)}")
    for name, words in (("source", source), ("target", target)):
        expect(words.shape[1] > 0, f"{where} {name}.shape", words.shape, "at least one word")
    for name, given, words in (("lengths", lengths, source), ("target_lengths", target_lengths, target)):
        fits = given is None or np.all((given >= 0) & (given <= words.shape[1]))
        expect(fits, f"{where} {name}", given, f"lengths from 0 to {words.shape[1]}")
    fits = len(cells) in (1, 2) and all(isinstance(cell, gru_cell.Params) for cell in cells)
    expect(fits, f"{where} params.encoder.cells", [type(cell) for cell in cells], "one or two of gru_cell.Params")
    hidden, shape = params.decoder.w_h.shape[1], params.read.weight.shape
    expect(shape[0] == 3 * hidden, f"{where} params.read.weight.shape", shape, f"3 H = {3 * hidden} rows")
    if params.deep is None:
        shape = params.word.weight.shape
        expect(shape[1] == hidden, f"{where} params.word.weight.shape", shape, f"H = {hidden} columns: deep is None")


def example(draw):
    n, s, t = draw.size("N", high=2), draw.size("S", low=2, high=3), draw.size("T", high=3)
    u, v = draw.size("U", high=3), draw.size("V", low=2, high=3)
    sizes = [draw.size(name, high=2) for name in ("E", "H", "A")]
    options = {"maxout": draw.choice("maxout", 2, 1, None), "directions": draw.choice("directions", 2, 2, 1)}
    params = tree_map(lambda a: a / 8, draw.like(init(draw.rng, u, v, *sizes, **options)))
    data = {
        "source": draw.integers(0, u - 1, n, s),
        "target": draw.integers(0, v - 1, n, t),
        "lengths": draw.integers(0, s, n) if draw.choice("source padded", True, False) else None,
        "target_lengths": draw.integers(0, t, n) if draw.choice("target padded", True, False) else None,
        "gru": draw.choice("gru", *GRUS),
    }
    return Call((params,), data)


ABOUT = About(
    weights="weights",
    laws=("weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("authors' code", "definition"),
)
