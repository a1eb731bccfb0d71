r"""Encoder and decoder of Luong's translation model.

A recurrent network reads the source backward; from where it ends, a second one writes the target, with attention.

Paper: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015
(arXiv:1508.04025), section 2 and figures 2 to 4.

Shapes
    N sentences of at most S source words and T target words; E features of a source word, F of a target word;
    L layers of H hidden units, A attentional features. lengths is the number of words in each source.

Forward
    m, state    = recurrent(source), from the last word to the first       encoder states m_0 ... m_lengths-1
    a, state'   = luong_decoder(target, m, state)                          attentional vectors, one per target word

Backward, with a bar for "gradient of the loss with respect to"
    targetbar, mbar, statebar = from the decoder's backward at abar and state'bar
    sourcebar                 = from the encoder's backward at mbar and statebar

Choices
    Everything here is in the order of the sentence. The authors' code stores a source reversed, with its padding in
    front, and counts in its length an end-of-sentence symbol that it neither reads nor attends to.
    The vocabulary is left to the reader: words come as vectors, and the softmax over words follows a.
    The authors clip states to 50 and gradients to 1000, which is not done here.
    score, feed, window and gaussian are those of luong_decoder.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.temporal import local_attention, luong_decoder, multiplicative
from refattn.core import About, Array, Call, Ints, Shaped, shaped, tree_map
from refattn.primitives import alignment_score, recurrent


class Params(NamedTuple):
    encoder: recurrent.Params
    decoder: luong_decoder.Params


class Saved(NamedTuple):
    weights: Shaped[Array, "N T S"]
    encoded: recurrent.Saved
    decoded: luong_decoder.Saved


def init(rng, source, target, hidden, attentional, attention, *, cell="lstm", layers=1, feed=True):
    """As the parts' own init; `attention` comes from multiplicative.init or local_attention.init."""
    sizes, options = (target, hidden, hidden, attentional), {"cell": cell, "layers": layers}
    decoder = luong_decoder.init(rng, *sizes, attention, feed=feed, **options)
    return Params(recurrent.init(rng, source, hidden, **options), decoder)


@shaped
def forward(
    source: Shaped[Array, "N S E"],
    target: Shaped[Array, "N T F"],
    params: Params,
    *,
    lengths: Shaped[Ints, "N"] | None = None,
    score: str = "general",
    feed: bool = True,
    window: int | None = None,
    gaussian: str = "weights",
) -> tuple[luong_decoder.Out, Saved]:
    mask = None if lengths is None else np.arange(source.shape[1]) < lengths[:, None]
    (memory, state), encoded = recurrent.forward(source, None, params.encoder, direction="backward", mask=mask)
    options = {"score": score, "feed": feed, "lengths": lengths, "window": window, "gaussian": gaussian}
    out, decoded = luong_decoder.forward(target, memory, state, params.decoder, **options)
    return out, Saved(decoded.weights, encoded, decoded)


@shaped
def backward(
    dout: luong_decoder.Out, saved: Saved
) -> tuple[Shaped[Array, "N S E"], Shaped[Array, "N T F"], Params]:
    dtarget, dmemory, dstate, ddecoder = luong_decoder.backward(dout, saved.decoded)
    dsource, _, dencoder = recurrent.backward(recurrent.Out(dmemory, dstate), saved.encoded)
    return dsource, dtarget, Params(dencoder, ddecoder)


def example(draw):
    n, s, t = draw.size("N", high=2), draw.size("S", high=3), draw.size("T", high=2)
    e, f, h, a, layers = (draw.size(name, high=2) for name in ("E", "F", "H", "A", "layers"))
    score, feed = draw.choice("score", *alignment_score.SCORES), draw.choice("feed", True, False)
    options = {"score": score, "feed": feed}
    if draw.choice("padded", True, False):
        options["lengths"] = draw.integers(0, s, n)
    if draw.choice("attention", "global", "local") == "global":
        attention = multiplicative.init(draw.rng, h, h, score=score)
    else:
        attention = local_attention.init(draw.rng, h, h, score=score, units=draw.choice("R", None, 2))
        options |= {"window": draw.size("window", high=2), "gaussian": draw.choice("gaussian", "weights", "scores")}
    cell = draw.choice("cell", "lstm", "gru")
    params = init(draw.rng, e, f, h, a, attention, cell=cell, layers=layers, feed=feed)
    args = draw.array(n, s, e), draw.array(n, t, f), draw.like(params)
    return Call(tree_map(lambda x: x / 8, args), options)  # a saturated gate hides mistakes


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval"),
    witnesses=("authors' code", "definition"),
)
