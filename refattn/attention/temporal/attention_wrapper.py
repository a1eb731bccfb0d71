r"""Attention wrapped around a recurrent cell.

Every step of the cell reads what the last step attended to; then its output decides what to attend to now.

Paper: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015
(arXiv:1508.04025), section 3.3, input feeding; with either that paper's scores or those of Bahdanau, Cho and Bengio.

Shapes
    N sentences, T target steps, S encoder states m_s of length K;
    E features in, H hidden units, A attentional features, O features out: A or H.

Forward, for t = 0, 1, ..., with a_-1 = 0
    h_t, state_t = cells([inputs_t; a_t-1], state_t-1)     see recurrent; h_t is the topmost h
    c_t = attention(h_t, m)                                see additive and multiplicative
    a_t = W [h_t; c_t] + b                                 or c_t where params.layer is None
    outputs_t = a_t                                        or h_t where output="cell"

Backward, with a bar for "gradient of the loss with respect to", from the last step to the first
    abar_t = what step t + 1 was fed, plus outputsbar_t    (or that to hbar_t)
    [hbar_t; cbar_t] += abar_t W                           or cbar_t = abar_t
    hbar_t, mbar     += from the attention's backward at cbar_t and the cotangent of the weights
    [inputsbar_t; abar_t-1], statebar_t-1: from the cells' backward at hbar_t and statebar_t
    mbar and the gradients of all parameters are sums over t

Choices
    This is AttentionWrapper of TensorFlow Addons, which tensorflow/nmt decodes with: additive attention goes with
    output="cell", multiplicative with output="attention"; neither has a tanh around W, nor the b.
    luong_decoder is the paper's, with the tanh. Which attention is said by params.attention; `score` is only for
    multiplicative. W reads the cell first, then the context; the paper has them the other way round.
    Cells may be of any kind and number that recurrent knows; GRUs reset after the recurrent product, as Keras' do.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.temporal import additive, multiplicative
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import alignment_score, linear, recurrent


class Params(NamedTuple):
    cells: recurrent.Params
    attention: tuple  # additive.Params or multiplicative.Params
    layer: linear.Params | None = None


class Out(NamedTuple):
    outputs: Shaped[Array, "N T O"]
    weights: Shaped[Array, "N T S"]
    attention: Shaped[Array, "N A"]  # a after the last step
    state: recurrent.State  # the cells' after the last step


class Saved(NamedTuple):
    weights: Shaped[Array, "N T S"]
    steps: tuple  # T times (recurrent.Saved, the attention's Saved, linear.Saved or None)
    params: Params
    output: str


def init(rng, inputs, memory, hidden, attention, *, attentional=None, cell="gru", layers=1):
    """As the parts' own init; `attention` from additive.init or multiplicative.init; attentional=None: no layer."""
    cells = recurrent.init(rng, inputs + (attentional or memory), hidden, cell=cell, layers=layers)
    layer = None if attentional is None else linear.init(rng, hidden + memory, attentional, bias=False)
    return Params(cells, attention, layer)


@shaped
def forward(
    inputs: Shaped[Array, "N T E"],
    memory: Shaped[Array, "N S K"],
    state: recurrent.State | None,
    params: Params,
    *,
    output: str = "attention",
    score: str = "general",
    mask: Shaped[Bools, "N S"] | None = None,
) -> tuple[Out, Saved]:
    _check(inputs, params, output)
    options = {"mask": mask} if _is_additive(params) else {"mask": mask, "score": score}
    features = memory.shape[2] if params.layer is None else len(params.layer.weight)
    a = np.zeros((len(inputs), 1, features), inputs.dtype)
    outputs, weights, steps = [], [], []
    for t in range(inputs.shape[1]):
        x = np.concatenate([inputs[:, t : t + 1], a], axis=2)
        (h, state), moved = recurrent.forward(x, state, params.cells)
        (a, w), attended = _attention(params).forward(h, memory, params.attention, **options)
        combined = None
        if params.layer is not None:
            a, combined = linear.forward(np.concatenate([h, a], axis=2), params.layer)
        outputs.append(a if output == "attention" else h)
        weights.append(w)
        steps.append((moved, attended, combined))
    outputs, weights = np.concatenate(outputs, axis=1), np.concatenate(weights, axis=1)
    return Out(outputs, weights, a[:, 0], state), Saved(weights, tuple(steps), params, output)


@shaped
def backward(
    dout: Out, saved: Saved
) -> tuple[Shaped[Array, "N T E"], Shaped[Array, "N S K"], recurrent.State | None, Params]:
    attention = _attention(saved.params)
    da, dstate, dmemory, dparams, dinputs = dout.attention[:, None], dout.state, 0, None, []
    for t in reversed(range(len(saved.steps))):
        moved, attended, combined = saved.steps[t]
        doutput, dweights = dout.outputs[:, t : t + 1], dout.weights[:, t : t + 1]
        da, dh = (da + doutput, 0) if saved.output == "attention" else (da, doutput)
        dcontext, dlayer = da, None
        if combined is not None:
            dboth, dlayer = linear.backward(da, combined)
            hidden = dout.state.h.shape[2]
            dh, dcontext = dh + dboth[:, :, :hidden], dboth[:, :, hidden:]
        dquery, dattended, dattention = attention.backward(attention.Out(dcontext, dweights), attended)
        dx, dstate, dcells = recurrent.backward(recurrent.Out(dh + dquery, dstate), moved)
        dinput, da = np.split(dx, [dx.shape[2] - da.shape[2]], axis=2)
        dinputs.insert(0, dinput)
        dmemory = dmemory + dattended
        share = Params(dcells, dattention, dlayer)
        dparams = share if dparams is None else tree_map(np.add, dparams, share)
    return np.concatenate(dinputs, axis=1), dmemory, dstate, dparams


def _is_additive(params):
    return isinstance(params.attention, additive.Params)


def _attention(params):
    return additive if _is_additive(params) else multiplicative


def _check(inputs, params, output):
    where, kind = "attention_wrapper.forward:", type(params.attention)
    expect(inputs.shape[1] > 0, f"{where} inputs.shape", inputs.shape, "at least one step")
    expect(output in ("attention", "cell"), f"{where} output", output, "'attention' or 'cell'")
    fits = kind in (additive.Params, multiplicative.Params)
    expect(fits, f"{where} params.attention", kind, "Params of additive or of multiplicative")


def example(draw):
    n, t, s = draw.size("N", high=2), draw.size("T", high=3), draw.size("S", high=3)
    inputs, memory, hidden = (draw.size(name, high=2) for name in ("E", "K", "H"))
    options = {
        "output": draw.choice("output", "attention", "cell"),
        "mask": draw.mask(n, s) if draw.choice("masked", True, False) else None,
    }
    if draw.choice("attention", "additive", "multiplicative") == "additive":
        attention = additive.init(draw.rng, hidden, memory, draw.size("units", high=2))
    else:
        options["score"] = draw.choice("score", *alignment_score.SCORES)
        memory = hidden if options["score"] == "dot" else memory
        attention = multiplicative.init(draw.rng, hidden, memory, score=options["score"])
    cell, layers, a = draw.choice("cell", "gru", "lstm"), draw.size("layers", high=2), draw.choice("A", 2, None)
    params = init(draw.rng, inputs, memory, hidden, attention, attentional=a, cell=cell, layers=layers)
    state = recurrent.State(np.zeros((n, layers, hidden)), np.zeros((n, layers, hidden)) if cell == "lstm" else None)
    state = draw.like(draw.choice("state", state, None))
    args = draw.array(n, t, inputs), draw.array(n, s, memory), state, draw.like(params)
    return Call(tree_map(lambda x: x / 8, args), options)  # a saturated gate hides mistakes


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("authors' code", "definition"),
)
