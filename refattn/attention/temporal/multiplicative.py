r"""Multiplicative attention.

Every decoder state looks at all encoder states, weighs them by how well they match it, and takes their mean.

Paper: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015
(arXiv:1508.04025), section 3.1, global attention.

Shapes
    N sentences, T decoder states h_t of length Q, S encoder states m_s of length K.

Forward
    e_nts = score(h_nt, m_ns)                 dot, general or concat: see alignment_score
    p_nts = softmax over s of e_nts           alignment weights, over the states that mask allows   (eq. 7)
    c_nt  = sum_s p_nts m_ns                  context

Backward, with a bar for "gradient of the loss with respect to"
    pbar_nts = cbar_nt . m_ns, plus what comes in through the weights, which are an output too
    ebar     = p (pbar - sum_s pbar p)        softmax
    hbar     = through the scores
    mbar_ns  = through the scores, plus sum_t p_nts cbar_nt          m is used twice: compared, and averaged

Choices
    mask=None lets every state be attended to, as the PyTorch chatbot tutorial does: its padded encoder states are 0,
    and still get weight. What is masked gets weight 0 and gradient 0. A sentence without any allowed state has
    context 0; TensorFlow Addons, which gives masked scores the smallest finite number, spreads the weights evenly then.
    Where all allowed scores are below about -745 and something is masked, the authors' MATLAB code underflows to
    weights 0 (its maximum includes a 0 for what is masked); here the largest allowed score is the maximum.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, shaped
from refattn.primitives import alignment_score, softmax

Params = alignment_score.Params
init = alignment_score.init


class Out(NamedTuple):
    context: Shaped[Array, "N T K"]
    weights: Shaped[Array, "N T S"]


class Saved(NamedTuple):
    memory: Shaped[Array, "N S K"]
    weights: Shaped[Array, "N T S"]
    scored: alignment_score.Saved
    normalised: softmax.Saved


@shaped
def forward(
    query: Shaped[Array, "N T Q"],
    memory: Shaped[Array, "N S K"],
    params: Params,
    *,
    score: str = "general",
    mask: Shaped[Bools, "N S"] | None = None,
) -> tuple[Out, Saved]:
    energy, scored = alignment_score.forward(query, memory, params, score=score)
    allowed = None if mask is None else np.broadcast_to(mask[:, None], energy.shape)
    weights, normalised = softmax.forward(energy, mask=allowed)
    return Out(weights @ memory, weights), Saved(memory, weights, scored, normalised)


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Shaped[Array, "N T Q"], Shaped[Array, "N S K"], Params]:
    memory, weights, scored, normalised = saved
    dweights = dout.context @ memory.swapaxes(1, 2) + dout.weights
    (denergy,) = softmax.backward(dweights, normalised)
    dquery, dmemory, dparams = alignment_score.backward(denergy, scored)
    return dquery, dmemory + weights.swapaxes(1, 2) @ dout.context, dparams


def example(draw):
    (query, memory, params), options = alignment_score.example(draw)
    mask = draw.mask(*memory.shape[:2]) if draw.choice("masked", True, False) else None
    return Call((query, memory, params), options | {"mask": mask})


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("authors' code", "definition", "relation"),
)
