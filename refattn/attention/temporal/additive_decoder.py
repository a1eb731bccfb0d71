r"""Recurrent decoder with additive attention.

Every step looks at the source with the state it comes from, and moves on by a GRU that reads what it saw.

Paper: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015
(arXiv:1409.0473), appendix A.2.2.

Shapes
    N sentences, T target steps, S encoder states h_j of length K, H hidden units.
    The gates are stacked in the order r, z, n; inputs are (N, T, 3, H).

Forward, for t = 0, 1, ..., with s_-1 = state
    c_t  = attention(s_t-1, h)                         see additive
    s'_t = gru(inputs_t + C c_t, s_t-1)                see gru_cell; inputs_t stands for W E y_t-1 + b in the paper
    s_t  = m_t s'_t + (1 - m_t) s_t-1                  the state waits where target_mask is False

Backward, with a bar for "gradient of the loss with respect to", from the last step to the first
    sbar_t      += what step t + 1 sends back
    s'bar_t      = m_t sbar_t
    inputsbar_t, part of sbar_t-1, from gru_cell's backward at s'bar_t
    Cbar        += sum_n inputsbar_t c_t
    c*           = cbar_t + inputsbar_t C              the context is an output too
    hbar        += and the rest of sbar_t-1, from additive's backward at c*
    sbar_t-1    += (1 - m_t) sbar_t

Choices
    The GRU is that of the authors' code: reset before the recurrent product, and z weighs the new state. The PyTorch
    tutorial has torch's: reset_after=True, z_weighs="old". As in the authors' code the inputs are projected by the
    caller, for all steps at once, and all biases are in there; torch's recurrent bias is gru_cell's b_h.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.temporal import additive
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import gru_cell


class Params(NamedTuple):
    attention: Shaped[additive.Params, "Q=H K=K"]
    w_c: Shaped[Array, "3 H K"]
    w_h: Shaped[Array, "3 H H"]
    b_h: Shaped[Array, "3 H"] | None = None


class Out(NamedTuple):
    states: Shaped[Array, "N T H"]
    contexts: Shaped[Array, "N T K"]


class Saved(NamedTuple):
    weights: Shaped[Array, "N T S"]
    contexts: Shaped[Array, "N T K"]
    steps: tuple  # T times (additive.Saved, gru_cell.Saved)
    params: Params
    target_mask: Shaped[Bools, "N T"] | None


def init(rng, memory, hidden, units, *, bias=False):
    """Attention as in additive.init; normal weights of variance 1 / columns, zero biases."""
    w_c, w_h = (rng.normal(size=(3, hidden, n)) / math.sqrt(n) for n in (memory, hidden))
    attention = additive.init(rng, hidden, memory, units, bias=bias)
    return Params(attention, w_c, w_h, np.zeros((3, hidden)) if bias else None)


@shaped
def forward(
    inputs: Shaped[Array, "N T 3 H"],
    memory: Shaped[Array, "N S K"],
    state: Shaped[Array, "N H"],
    params: Params,
    *,
    mask: Shaped[Bools, "N S"] | None = None,
    target_mask: Shaped[Bools, "N T"] | None = None,
    reset_after: bool = False,
    z_weighs: str = "new",
) -> tuple[Out, Saved]:
    expect(inputs.shape[1] > 0, "additive_decoder.forward: inputs.shape", inputs.shape, "at least one step")
    expect(z_weighs in ("old", "new"), "additive_decoder.forward: z_weighs", z_weighs, "'old' or 'new'")
    cell = gru_cell.Params(None, params.w_h, b_h=params.b_h)
    states, contexts, weights, steps = [], [], [], []
    for t in range(inputs.shape[1]):
        (context, weight), attended = additive.forward(state[:, None], memory, params.attention, mask=mask)
        a = inputs[:, t] + np.einsum("nk,ghk->ngh", context[:, 0], params.w_c)
        new, moved = gru_cell.forward(_flat(a), state, cell, reset_after=reset_after, z_weighs=z_weighs)
        state = new if target_mask is None else np.where(target_mask[:, t, None], new, state)
        states.append(state)
        contexts.append(context)
        weights.append(weight)
        steps.append((attended, moved))
    contexts = np.concatenate(contexts, axis=1)
    saved = Saved(np.concatenate(weights, axis=1), contexts, tuple(steps), params, target_mask)
    return Out(np.stack(states, axis=1), contexts), saved


@shaped
def backward(
    dout: Out, saved: Saved
) -> tuple[Shaped[Array, "N T 3 H"], Shaped[Array, "N S K"], Shaped[Array, "N H"], Params]:
    params, target_mask = saved.params, saved.target_mask
    dstate, dmemory, dparams, dinputs = 0, 0, None, []
    for t in reversed(range(len(saved.steps))):
        attended, moved = saved.steps[t]
        dstate = dout.states[:, t] + dstate
        there = True if target_mask is None else target_mask[:, t, None]
        dnew, dwaiting = np.where(there, dstate, 0), np.where(there, 0, dstate)
        da, dbefore, dcell = gru_cell.backward(dnew, moved)
        da = da.reshape(len(da), *dcell.w_h.shape[:2])
        dw_c = np.einsum("ngh,nk->ghk", da, saved.contexts[:, t])
        dcontext = dout.contexts[:, t] + np.einsum("ngh,ghk->nk", da, params.w_c)
        seen = additive.Out(dcontext[:, None], np.zeros_like(saved.weights[:, t : t + 1]))
        dquery, dattended, dattention = additive.backward(seen, attended)
        dstate = dbefore + dquery[:, 0] + dwaiting
        dmemory = dmemory + dattended
        share = Params(dattention, dw_c, dcell.w_h, dcell.b_h)
        dparams = share if dparams is None else tree_map(np.add, dparams, share)
        dinputs.insert(0, da)
    return np.stack(dinputs, axis=1), dmemory, dstate, dparams


def _flat(a):
    """(N, 3, H) as (N, 3 H)."""
    return a.reshape(len(a), a.shape[1] * a.shape[2])


def example(draw):
    n, t, s = draw.size("N", high=2), draw.size("T", high=3), draw.size("S", high=3)
    memory, hidden, units = (draw.size(name, high=2) for name in ("K", "H", "A"))
    params = draw.like(init(draw.rng, memory, hidden, units, bias=draw.choice("bias", True, False)))
    args = draw.array(n, t, 3, hidden), draw.array(n, s, memory), draw.array(n, hidden), params
    options = {
        "mask": draw.mask(n, s) if draw.choice("masked", True, False) else None,
        "target_mask": draw.mask(n, t) if draw.choice("target masked", True, False) else None,
        "reset_after": draw.choice("reset_after", False, True),
        "z_weighs": draw.choice("z_weighs", "new", "old"),
    }
    return Call(tree_map(lambda a: a / 8, args), options)  # a saturated gate hides mistakes


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one", "key_permutation_invariant"),
    witnesses=("authors' code", "definition", "relation"),
)
