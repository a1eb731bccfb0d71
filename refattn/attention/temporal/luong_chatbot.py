r"""Chatbot: bidirectional encoder, and decoder with Luong's attention.

From word to word of the reply, the decoder looks at all that was said, and predicts the next.

Paper: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015
(arXiv:1508.04025), section 3.1, in the form of the PyTorch chatbot tutorial.

Shapes
    N dialogues; S words of what was said, T words of the reply; V words in the vocabulary, E features of a word;
    L layers of H hidden units, A attentional features.

Forward
    x, z         = rows source and target of one table       see embedding
    [f; b], u    = recurrent(x) in both directions           outputs, and the states after the last steps
    m            = f + b                                     encoder states, 0 where padded
    a, state     = luong_decoder(z, m, first L states of u)  without input feeding
    p_nt         = softmax of W a_nt + bias                  probabilities of the next word

Backward, with a bar for "gradient of the loss with respect to"
    abar         = through softmax and W
    zbar, mbar, first L states of ubar = from the decoder's backward at abar and statebar
    xbar         = from the encoder's backward at [mbar; mbar] and ubar, 0 in its other states
    tablebar     = xbar added up by source, plus zbar added up by target

Choices
    The tutorial lets the decoder attend to padding, whose encoder states are 0; mask_padding=True does not.
    With L layers the decoder starts from the first L of the encoder's 2 L states, as in the tutorial: for L = 1 that is
    the forward state, for L = 2 both states of layer 0. lengths=None: no padding.
    target is what the decoder reads: the reply, with a start symbol in front and without its last word.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.temporal import luong_decoder, multiplicative
from refattn.core import About, Array, Call, Ints, Shaped, shaped, tree_map
from refattn.primitives import alignment_score, embedding, linear, recurrent, softmax


class Params(NamedTuple):
    table: Shaped[Array, "V E"]
    encoder: recurrent.Params
    decoder: luong_decoder.Params
    word: Shaped[linear.Params, "O=V I=A"]


class Out(NamedTuple):
    probabilities: Shaped[Array, "N T V"]
    state: recurrent.State


class Saved(NamedTuple):
    weights: Shaped[Array, "N T S"]
    source: embedding.Saved
    target: embedding.Saved
    encoded: recurrent.Saved
    decoded: luong_decoder.Saved
    word: linear.Saved
    normalised: softmax.Saved


def init(rng, vocabulary, features, hidden, attentional, *, score="general", cell="gru", layers=1):
    """A normal table; the rest as the parts' own init."""
    attention = multiplicative.init(rng, hidden, hidden, score=score)
    options = {"cell": cell, "layers": layers}
    return Params(
        rng.normal(size=(vocabulary, features)),
        recurrent.init(rng, features, hidden, direction="both", **options),
        luong_decoder.init(rng, features, hidden, hidden, attentional, attention, feed=False, bias=True, **options),
        linear.init(rng, attentional, vocabulary),
    )


@shaped
def forward(
    params: Params,
    *,
    source: Shaped[Ints, "N S"],
    target: Shaped[Ints, "N T"],
    lengths: Shaped[Ints, "N"] | None = None,
    score: str = "general",
    mask_padding: bool = False,
) -> tuple[Out, Saved]:
    layers = len(params.decoder.cells.cells)
    mask = None if lengths is None else np.arange(source.shape[1]) < lengths[:, None]
    (x, saved_x), (z, saved_z) = (embedding.forward(params.table, ids=ids) for ids in (source, target))
    (y, states), encoded = recurrent.forward(x, None, params.encoder, direction="both", mask=mask)
    memory = np.add(*np.split(y, 2, axis=2))
    start = tree_map(lambda s: s[:, :layers], states)
    options = {"score": score, "feed": False, "lengths": lengths if mask_padding else None}
    (a, state), decoded = luong_decoder.forward(z, memory, start, params.decoder, **options)
    logits, word = linear.forward(a, params.word)
    p, normalised = softmax.forward(logits)
    return Out(p, state), Saved(decoded.weights, saved_x, saved_z, encoded, decoded, word, normalised)


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Params]:
    (dlogits,) = softmax.backward(dout.probabilities, saved.normalised)
    da, dword = linear.backward(dlogits, saved.word)
    dz, dmemory, dstart, ddecoder = luong_decoder.backward(luong_decoder.Out(da, dout.state), saved.decoded)
    dstates = tree_map(lambda s: np.concatenate([s, np.zeros_like(s)], axis=1), dstart)
    dx, _, dencoder = recurrent.backward(recurrent.Out(np.tile(dmemory, 2), dstates), saved.encoded)
    (by_source,), (by_target,) = embedding.backward(dx, saved.source), embedding.backward(dz, saved.target)
    return (Params(by_source + by_target, dencoder, ddecoder, dword),)


def example(draw):
    n, s, t, v = draw.size("N", high=2), draw.size("S", low=2, high=3), draw.size("T", high=2), draw.size("V")
    sizes = (draw.size(name, high=2) for name in ("E", "H", "A"))
    score, cell = draw.choice("score", *alignment_score.SCORES), draw.choice("cell", "gru", "lstm")
    params = init(draw.rng, v, *sizes, score=score, cell=cell, layers=draw.choice("L", 1, 2))
    options = {
        "source": draw.integers(0, v - 1, n, s),
        "target": draw.integers(0, v - 1, n, t),
        "lengths": draw.integers(0, s, n) if draw.choice("padded", True, True, False) else None,
        "score": score,
        "mask_padding": draw.choice("mask_padding", False, True),
    }
    return Call((tree_map(lambda x: x / 8, draw.like(params)),), options)  # a saturated gate hides mistakes


ABOUT = About(
    weights="weights",
    laws=("weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("authors' code", "definition"),
)
