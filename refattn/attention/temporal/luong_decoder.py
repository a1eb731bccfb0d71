r"""Recurrent decoder with Luong's attention and input feeding.

Paper: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015
(arXiv:1508.04025), sections 3.1 and 3.3, figure 4.

Shapes
    N sentences, T target steps, S encoder states m_s of length K;
    E features in, H hidden units, A attentional features.

Forward, for t = 0, 1, ..., with a_-1 = 0
    x_t = [inputs_t; a_t-1]                           input feeding; inputs_t alone where feed=False
    h_t, state_t = cells(x_t, state_t-1)              see recurrent; h_t is the topmost h
    c_t = attention(h_t, m)                           see multiplicative (global) and local_attention
    a_t = tanh(W [c_t; h_t] + b)                      attentional vector   (eq. 5)

Backward, with a bar for "gradient of the loss with respect to", from the last step to the first
    abar_t += what x_t+1 was fed
    [cbar_t; hbar_t] = abar_t (1 - a_t^2) W
    hbar_t, mbar     += from the attention's backward at cbar_t
    xbar_t, statebar_t-1 from the cells' backward at hbar_t and statebar_t
    inputsbar_t, abar_t-1 = the two parts of xbar_t
    mbar and the gradients of all parameters are sums over t

Choices
    Global or local is said by params.attention: Params of multiplicative or of local_attention; for local, `window` is
    needed. Neither the paper nor the authors' code has the bias b (None); the PyTorch chatbot tutorial has it, and
    puts h before c in W. lengths counts the encoder states that may be attended to; the authors' len counts one more,
    for the end of the sentence. Any cells that recurrent knows, in any number of layers: the authors' are LSTMs.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.temporal import local_attention, multiplicative
from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped, tree_map
from refattn.primitives import alignment_score, linear, recurrent


class Params(NamedTuple):
    cells: recurrent.Params
    attention: tuple  # multiplicative.Params or local_attention.Params
    combine: linear.Params


class Out(NamedTuple):
    attentional: Shaped[Array, "N T A"]
    state: recurrent.State  # after the last step


class Saved(NamedTuple):
    memory: Shaped[Array, "N S K"]
    attentional: Shaped[Array, "N T A"]
    weights: Shaped[Array, "N T S"]
    steps: tuple  # T times (recurrent.Saved, the attention's Saved, linear.Saved)
    params: Params
    feed: bool


def init(rng, inputs, memory, hidden, attentional, attention, *, cell="lstm", layers=1, feed=True, bias=False):
    """As the parts' own init; `attention` comes from multiplicative.init or local_attention.init."""
    cells = recurrent.init(rng, inputs + (attentional if feed else 0), hidden, cell=cell, layers=layers)
    return Params(cells, attention, linear.init(rng, memory + hidden, attentional, bias))


@shaped
def forward(
    inputs: Shaped[Array, "N T E"],
    memory: Shaped[Array, "N S K"],
    state: recurrent.State,
    params: Params,
    *,
    score: str = "general",
    feed: bool = True,
    lengths: Shaped[Ints, "N"] | None = None,
    window: int | None = None,
    gaussian: str = "weights",
) -> tuple[Out, Saved]:
    _check(inputs, memory, params, window, lengths)
    a = np.zeros((len(inputs), 1, len(params.combine.weight)), inputs.dtype)
    attentional, weights, steps = [], [], []
    for t in range(inputs.shape[1]):
        x = inputs[:, t : t + 1]
        (h, state), moved = recurrent.forward(np.concatenate([x, a], axis=2) if feed else x, state, params.cells)
        if _is_local(params):
            options = {"score": score, "window": window, "gaussian": gaussian, "lengths": lengths, "start": t}
            (c, w), attended = local_attention.forward(h, memory, params.attention, **options)
        else:
            mask = None if lengths is None else np.arange(memory.shape[1]) < lengths[:, None]
            (c, w), attended = multiplicative.forward(h, memory, params.attention, score=score, mask=mask)
        u, combined = linear.forward(np.concatenate([c, h], axis=2), params.combine)
        a = np.tanh(u)
        attentional.append(a)
        weights.append(w)
        steps.append((moved, attended, combined))
    attentional, weights = np.concatenate(attentional, axis=1), np.concatenate(weights, axis=1)
    return Out(attentional, state), Saved(memory, attentional, weights, tuple(steps), params, feed)


@shaped
def backward(
    dout: Out, saved: Saved
) -> tuple[Shaped[Array, "N T E"], Shaped[Array, "N S K"], recurrent.State, Params]:
    memory, params = saved.memory, saved.params
    attention = local_attention if _is_local(params) else multiplicative
    width, features = memory.shape[2], dout.attentional.shape[2]
    dstate, dfed, dmemory, dparams, dinputs = dout.state, 0, 0, None, []
    for t in reversed(range(len(saved.steps))):
        moved, attended, combined = saved.steps[t]
        a, w = saved.attentional[:, t : t + 1], saved.weights[:, t : t + 1]
        da = dout.attentional[:, t : t + 1] + dfed
        dboth, dcombine = linear.backward(da * (1 - a * a), combined)
        dc, dh = dboth[:, :, :width], dboth[:, :, width:]
        dquery, dm, dattention = attention.backward(attention.Out(dc, np.zeros_like(w)), attended)
        dx, dstate, dcells = recurrent.backward(recurrent.Out(dh + dquery, dstate), moved)
        if saved.feed:
            dx, dfed = dx[:, :, :-features], dx[:, :, -features:]
        dinputs.insert(0, dx)
        dmemory = dmemory + dm
        share = Params(dcells, dattention, dcombine)
        dparams = share if dparams is None else tree_map(np.add, dparams, share)
    return np.concatenate(dinputs, axis=1), dmemory, dstate, dparams


def _is_local(params):
    return isinstance(params.attention, local_attention.Params)


def _check(inputs, memory, params, window, lengths):
    where, local = "luong_decoder.forward:", _is_local(params)
    expect(inputs.shape[1] > 0, f"{where} inputs.shape", inputs.shape, "at least one step")
    kinds = "Params of multiplicative or of local_attention"
    fits = local or isinstance(params.attention, multiplicative.Params)
    expect(fits, f"{where} params.attention", type(params.attention).__name__, kinds)
    fits = (window is not None) == local
    expect(fits, f"{where} window", window, f"{'an int' if local else 'None'}, as params.attention is of {kinds}")
    if lengths is not None:
        fits = np.all((lengths >= 0) & (lengths <= memory.shape[1]))
        expect(fits, f"{where} lengths", lengths, f"lengths from 0 to S = {memory.shape[1]}, from memory")


def example(draw):
    n, t, s = draw.size("N", high=2), draw.size("T", high=3), draw.size("S")
    e, a, h, layers = (draw.size(name, high=2) for name in ("E", "A", "H", "layers"))
    score, feed = draw.choice("score", *alignment_score.SCORES), draw.choice("feed", True, False)
    k = h if score == "dot" else draw.size("K", high=2)
    options = {"score": score, "feed": feed}
    if draw.choice("padded", True, False):
        options["lengths"] = draw.integers(0, s, n)
    attention = alignment_score.init(draw.rng, h, k, score=score)
    kind = draw.choice("attention", "global", "local-m", "local-p")
    if kind != "global":
        attention = local_attention.init(draw.rng, h, k, score=score, units=2 if kind == "local-p" else None)
        options["window"] = draw.size("window", low=int(kind == "local-p"), high=1)
        options["gaussian"] = draw.choice("gaussian", "weights", "scores")
    cell, bias = draw.choice("cell", "lstm", "gru"), draw.choice("bias", True, False)
    params = init(draw.rng, e, k, h, a, attention, cell=cell, layers=layers, feed=feed, bias=bias)
    state = recurrent.State(np.zeros((n, layers, h)), np.zeros((n, layers, h)) if cell == "lstm" else None)
    args = draw.array(n, t, e), draw.array(n, s, k), draw.like(state), draw.like(params)
    return Call(tree_map(lambda x: x / 8, args), options)  # a saturated gate hides mistakes


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval"),
    witnesses=("definition", "relation"),
)
