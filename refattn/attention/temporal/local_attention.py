r"""Local attention.

Every decoder state looks only at a window of encoder states: around its own position, or around one it predicts.

Paper: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015
(arXiv:1508.04025), section 3.2, local attention: local-m (monotonic) and local-p (predictive).

Shapes
    N sentences, T decoder states h_t of length Q, S encoder states m_s of length K, R units that predict;
    D = window, L_n = lengths. Positions t and s count from 0.

Forward
    e_nts = score(h_nt, m_ns)                             see alignment_score
    local-m:  c_nt = min(t, L_n - 1)                      the centre
    local-p:  p_nt = L_n sigmoid(v . tanh(W h_nt)),   c_nt = floor(p_nt)                              (eq. 9)
    window:   s with |s - c_nt| <= D and s < L_n
    local-m:  a_nts = softmax over the window of e_nts
    local-p:  a_nts = softmax over the window of e_nts  *  k_nts                                      (eq. 10)
              k_nts = exp(-(s - p_nt)^2 / (2 sigma^2)),   sigma = D / 2
    context_nt = sum_s a_nts m_ns

Backward, with a bar for "gradient of the loss with respect to"
    abar_nts = contextbar_nt . m_ns, plus what comes in through the weights, which are an output too
    kbar     = abar softmax(e)                            and the softmax gets abar k
    pbar_nt  = sum_s kbar_nts k_nts (s - p_nt) / sigma^2  floor is flat: the centre has no gradient
    through sigmoid and tanh to v, W and h
    hbar, mbar through the scores too; mbar_ns also gets sum_t a_nts contextbar_nt

Choices
    params.position=None is local-m. The weights of local-p do not sum to 1: the Gaussian comes after the softmax, and
    is not normalised. gaussian="scores" is the authors' later normLocalAttn: softmax over the window of e k.
    The authors' code counts positions from 1 and predicts (len - 1) sigmoid(...) + 1, where len counts the
    end-of-sentence symbol, which is not attended to: counted from 0, with L = len - 1, that is p_nt. lengths=None is S.
    The paper's local-m has the centre t; the authors' code stops it at the last position, and so does this one.
    The window of local-p is around floor(p), as in the authors' code; the paper says [p - D, p + D].
    The authors keep 2D + 1 weights per decoder state; here they stand at their position in the sentence, zeros around.
    `start` is the position of the first decoder state, for those who decode step by step.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped
from refattn.elementwise import sigmoid
from refattn.primitives import alignment_score, softmax


class Position(NamedTuple):
    weight: Shaped[Array, "R Q"]
    v: Shaped[Array, "R"]


class Params(NamedTuple):
    score: alignment_score.Params
    position: Position | None = None


class Out(NamedTuple):
    context: Shaped[Array, "N T K"]
    weights: Shaped[Array, "N T S"]


class Predicted(NamedTuple):
    hidden: Shaped[Array, "N T R"]  # tanh(W h)
    share: Shaped[Array, "N T"]  # sigmoid(v . hidden) = p / L
    offset: Shaped[Array, "N T S"]  # s - p


class Saved(NamedTuple):
    query: Shaped[Array, "N T Q"]
    memory: Shaped[Array, "N S K"]
    energy: Shaped[Array, "N T S"]
    kernel: Shaped[Array, "N T S"]
    weights: Shaped[Array, "N T S"]
    predicted: Predicted | None
    scored: alignment_score.Saved
    normalised: softmax.Saved
    params: Params
    lengths: Shaped[Ints, "N"]
    window: int
    gaussian: str


def init(rng, query, memory, *, units=None, **options):
    """Normal weights of variance 1 / columns; units=R makes it local-p; other options as in alignment_score.init."""
    score = alignment_score.init(rng, query, memory, **options)
    if units is None:
        return Params(score)
    weight, v = rng.normal(size=(units, query)), rng.normal(size=units)
    return Params(score, Position(weight / math.sqrt(query), v / math.sqrt(units)))


@shaped
def forward(
    query: Shaped[Array, "N T Q"],
    memory: Shaped[Array, "N S K"],
    params: Params,
    *,
    window: int,
    score: str = "general",
    gaussian: str = "weights",
    lengths: Shaped[Ints, "N"] | None = None,
    start: int = 0,
) -> tuple[Out, Saved]:
    lengths = np.full(len(memory), memory.shape[1]) if lengths is None else lengths
    _check(memory, params, window, gaussian, lengths, start)
    energy, scored = alignment_score.forward(query, memory, params.score, score=score)
    sites = np.arange(memory.shape[1])
    if params.position is None:
        predicted, kernel = None, np.ones_like(energy)
        centre = np.minimum(np.arange(start, start + query.shape[1]), lengths[:, None] - 1)
    else:
        hidden = np.tanh(query @ params.position.weight.T)
        share = sigmoid(hidden @ params.position.v)
        p = lengths[:, None].astype(share.dtype) * share
        predicted = Predicted(hidden, share, sites.astype(p.dtype) - p[:, :, None])
        kernel = np.exp(-2 * (predicted.offset / window) ** 2)
        centre = np.floor(p.real)

    allowed = (np.abs(sites - centre[:, :, None]) <= window) & (sites < lengths[:, None, None])
    if gaussian == "weights":
        unweighted, normalised = softmax.forward(energy, mask=allowed)
        weights = unweighted * kernel
    else:
        weights, normalised = softmax.forward(energy * kernel, mask=allowed)
    saved = Saved(
        query, memory, energy, kernel, weights, predicted, scored, normalised, params, lengths, window, gaussian
    )
    return Out(weights @ memory, weights), saved


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Shaped[Array, "N T Q"], Shaped[Array, "N S K"], Params]:
    dweights = dout.context @ saved.memory.swapaxes(1, 2) + dout.weights
    if saved.gaussian == "weights":
        dkernel = dweights * saved.normalised.p
        (denergy,) = softmax.backward(dweights * saved.kernel, saved.normalised)
    else:
        (dproduct,) = softmax.backward(dweights, saved.normalised)
        denergy, dkernel = dproduct * saved.kernel, dproduct * saved.energy
    dquery, dmemory, dscore = alignment_score.backward(denergy, saved.scored)
    dmemory = dmemory + saved.weights.swapaxes(1, 2) @ dout.context
    if saved.predicted is None:
        return dquery, dmemory, Params(dscore)

    (hidden, share, offset), (weight, v) = saved.predicted, saved.params.position
    dp = (dkernel * saved.kernel * offset).sum(axis=2) * (4 / saved.window**2)
    du = dp * saved.lengths[:, None].astype(dp.dtype) * share * (1 - share)  # u = v . hidden
    da = du[:, :, None] * v * (1 - hidden * hidden)  # a = W h
    dposition = Position(np.einsum("ntr,ntq->rq", da, saved.query), np.einsum("nt,ntr->r", du, hidden))
    return dquery + da @ weight, dmemory, Params(dscore, dposition)


def _check(memory, params, window, gaussian, lengths, start):
    where, least = "local_attention.forward:", 0 if params.position is None else 1
    expect(isinstance(window, int) and window >= least, f"{where} window", window, f"an int of at least {least}")
    expect(gaussian in ("weights", "scores"), f"{where} gaussian", gaussian, "'weights' or 'scores'")
    expect(isinstance(start, int) and start >= 0, f"{where} start", start, "an int of at least 0")
    fits = np.all((lengths >= 0) & (lengths <= memory.shape[1]))
    expect(fits, f"{where} lengths", lengths, f"lengths from 0 to S = {memory.shape[1]}, from memory")


def example(draw):
    (query, memory, score), options = alignment_score.example(draw)
    options |= {"start": draw.size("start", low=0, high=3), "gaussian": draw.choice("gaussian", "weights", "scores")}
    if draw.choice("lengths", True, False):
        options["lengths"] = draw.integers(0, memory.shape[1], len(memory))
    position = None
    if draw.choice("alignment", "predictive", "monotonic") == "predictive":
        units = draw.size("R", high=3)
        position = Position(draw.array(units, query.shape[2]) / 8, draw.array(units) / 4)
    options["window"] = draw.size("window", low=0 if position is None else 1, high=2)
    return Call((query, memory, Params(score, position)), options)


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval"),
    witnesses=("definition", "relation"),
)
