r"""Non-local block.

Every position adds to itself a mapped mean of all positions, weighted by a similarity of pairs.

Paper: Wang, Girshick, Gupta and He, "Non-local Neural Networks", CVPR 2018 (arXiv:1711.07971), equations 1 to 6.

Shapes
    N items, C channels, *S space: (W), (H, W) or (T, H, W). i runs over its P positions, j over the Q positions that
    are left after pooling: Q = P without pooling. K channels of theta and phi, D channels of g.

Forward
    theta_i = Wt x_i + bt,   phi_j = Wp x_j + bp,   g_j = Wg x_j + bg                  1x1 convolutions
    s_ij = theta_i . phi_j / sqrt(K),   a_ij = e^{s_ij} / sum_j e^{s_ij}               embedded_gaussian
    s_ij = x_i . x_j / sqrt(C),         a_ij = e^{s_ij} / sum_j e^{s_ij}               gaussian
    a_ij = theta_i . phi_j / Q                                                         dot_product
    a_ij = max(wt . theta_i + wp . phi_j, 0) / Q                                       concatenation
    t_i = sum_j a_ij g_j
    y_i = x_i + batch_norm(Wo t_i + bo)

Backward, with a bar for "gradient of the loss with respect to"
    tbar = Wo' applied to the batch normalisation's gradient of ybar
    gbar_j = sum_i a_ij tbar_i,   abar_ij = tbar_i . g_j
    sbar_ij = a_ij (abar_ij - sum_j abar_ij a_ij)  softmax, else sbar = abar
    sbar_ij = sbar_ij [a_ij > 0]                   concatenation
    sbar_ij = sbar_ij / sqrt(K)                    or / Q without softmax
    thetabar_i = sum_j sbar_ij phi_j,   phibar_j = sum_i sbar_ij theta_i               all but concatenation
    ubar_i = sum_j sbar_ij,   vbar_j = sum_i sbar_ij                                   concatenation, u = wt . theta
    thetabar_i = ubar_i wt,   phibar_j = vbar_j wp,   wtbar = sum_i ubar_i theta_i,   wpbar = sum_j vbar_j phi_j
    xbar_i = ybar_i + thetabar_i Wt + (phibar Wp + gbar Wg)_i, through the pooling where there is one

Choices
    mode: the authors' release has embedded_gaussian, the default, and dot_product; the paper has all four.
    pool: windows of 2 in every axis but time. "before" phi and g, as in the release; "after" them, as in the paper and
    in the common PyTorch port; or None.
    scale: the division by sqrt(K) is in the release, not in the paper or the port. Only for the two with a softmax.
    What is absent is left out: theta and phi for gaussian, concat but for concatenation, every bias, norm=None.
    stats=None is training, given stats are inference: see batch_norm. The release's frozen affine layer is
    stats of mean 0 and variance 1 with eps=0. The norm's gamma starts at 0: the block starts as the identity.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.elementwise import relu
from refattn.primitives import batch_norm, linear, max_pool

SOFTMAX_MODES = ("embedded_gaussian", "gaussian")
MODES = (*SOFTMAX_MODES, "dot_product", "concatenation")


class Params(NamedTuple):
    g: Shaped[linear.Params, "I=C O=D"]
    out: Shaped[linear.Params, "I=D O=C"]
    theta: Shaped[linear.Params, "I=C O=K"] | None = None
    phi: Shaped[linear.Params, "I=C O=K"] | None = None
    concat: Shaped[Array, "2 K"] | None = None  # wt and wp
    norm: Shaped[batch_norm.Params, "C=C"] | None = None


class Saved(NamedTuple):
    theta_map: linear.Saved | None
    phi_map: linear.Saved | None
    g_map: linear.Saved
    out_map: linear.Saved
    norm: batch_norm.Saved | None
    x_pool: max_pool.Saved | None
    phi_pool: max_pool.Saved | None
    g_pool: max_pool.Saved | None
    theta: Shaped[Array, "N P K"]
    phi: Shaped[Array, "N Q K"]
    g: Shaped[Array, "N Q D"]
    weights: Shaped[Array, "N P Q"]
    concat: Shaped[Array, "2 K"] | None
    mode: str
    factor: float


def init(rng, channels, inner=None, *, mode="embedded_gaussian", bias=True, norm=True):
    """Normal weights of standard deviation 0.01, zero biases, a norm with gamma = 0; inner is C / 2 unless given."""
    inner = max(channels // 2, 1) if inner is None else inner
    embedded = mode != "gaussian"

    def pointwise(inputs, outputs):
        return linear.Params(0.01 * rng.normal(size=(outputs, inputs)), np.zeros(outputs) if bias else None)

    return Params(
        g=pointwise(channels, inner),
        out=pointwise(inner, channels),
        theta=pointwise(channels, inner) if embedded else None,
        phi=pointwise(channels, inner) if embedded else None,
        concat=0.01 * rng.normal(size=(2, inner)) if mode == "concatenation" else None,
        norm=batch_norm.Params(np.zeros(channels), np.zeros(channels)) if norm else None,
    )


@shaped
def forward(
    x: Shaped[Array, "N C *S"],
    params: Params,
    *,
    mode: str = "embedded_gaussian",
    pool: str | None = "before",
    scale: bool = True,
    stats: Shaped[batch_norm.Stats, "C=C"] | None = None,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "N C *S"], Saved]:
    _check(x, params, mode, pool, stats)
    rows, space, concat = _rows(x), x.shape[2:], params.concat
    keys, x_pool = _pooled(rows, space, pool == "before")
    theta, theta_map = _embedded(rows, params.theta)
    phi, phi_map = _embedded(keys, params.phi)
    g, g_map = _embedded(keys, params.g)
    phi, phi_pool = _pooled(phi, space, pool == "after")
    g, g_pool = _pooled(g, space, pool == "after")

    if mode == "concatenation":
        weights = relu((theta @ concat[0])[:, :, None] + (phi @ concat[1])[:, None, :])
    else:
        weights = theta @ phi.swapaxes(1, 2)
    if mode in SOFTMAX_MODES:
        factor = 1 / math.sqrt(theta.shape[2]) if scale else 1.0
        weights *= factor
        weights -= weights.real.max(axis=2, keepdims=True, initial=-np.inf)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=2, keepdims=True)
    else:
        factor = 1 / max(phi.shape[1], 1)
        weights *= factor

    mapped, out_map = linear.forward(weights @ g, params.out)
    change, norm = _image(mapped, space), None
    if params.norm is not None:
        change, norm = batch_norm.forward(change, params.norm, stats=stats, eps=eps)
    maps, pools = (theta_map, phi_map, g_map, out_map), (x_pool, phi_pool, g_pool)
    return x + change, Saved(*maps, norm, *pools, theta, phi, g, weights, concat, mode, factor)


@shaped
def backward(dy: Shaped[Array, "N C *S"], saved: Saved) -> tuple[Shaped[Array, "N C *S"], Params]:
    theta, phi, g, weights, concat = saved.theta, saved.phi, saved.g, saved.weights, saved.concat
    dchange, dnorm, dconcat = dy, None, None
    if saved.norm is not None:
        dchange, dnorm = batch_norm.backward(dy, saved.norm)
    dt, dout = linear.backward(_rows(dchange), saved.out_map)

    dg = weights.swapaxes(1, 2) @ dt
    dscores = dt @ g.swapaxes(1, 2)
    if saved.mode in SOFTMAX_MODES:
        dscores -= np.einsum("npq,npq->np", dscores, weights)[:, :, None]
        dscores *= weights
    if saved.mode == "concatenation":
        dscores *= weights.real > 0
    dscores *= saved.factor
    if saved.mode == "concatenation":
        du, dv = dscores.sum(axis=2, keepdims=True), dscores.sum(axis=1)[:, :, None]
        dtheta, dphi = du * concat[0], dv * concat[1]
        dconcat = np.stack([(du * theta).sum(axis=(0, 1)), (dv * phi).sum(axis=(0, 1))])
    else:
        dtheta, dphi = dscores @ phi, dscores.swapaxes(1, 2) @ theta

    dphi, dg = _unpooled(dphi, saved.phi_pool), _unpooled(dg, saved.g_pool)
    drows, dtheta = _unembedded(dtheta, saved.theta_map)
    dkeys_phi, dphi = _unembedded(dphi, saved.phi_map)
    dkeys_g, dg = _unembedded(dg, saved.g_map)
    drows = drows + _unpooled(dkeys_phi + dkeys_g, saved.x_pool)
    return dy + _image(drows, dy.shape[2:]), Params(dg, dout, dtheta, dphi, dconcat, dnorm)


def _rows(x):
    """(N, C, *S) to (N, P, C): one row per position."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:])).swapaxes(1, 2)


def _embedded(rows, params):
    return (rows, None) if params is None else linear.forward(rows, params)


def _unembedded(drows, saved):
    return (drows, None) if saved is None else linear.backward(drows, saved)


def _image(rows, space):
    """(N, P, C) to (N, C, *S)."""
    return rows.swapaxes(1, 2).reshape(rows.shape[0], rows.shape[2], *space)


def _pooled(rows, space, wanted):
    """Rows of positions in space, max-pooled where they lie."""
    if not wanted:
        return rows, None
    smaller, saved = max_pool.forward(_image(rows, space), kernel=_window(space))
    return _rows(smaller), saved


def _unpooled(drows, saved):
    if saved is None:
        return drows
    (dimage,) = max_pool.backward(_image(drows, saved.windows.output), saved)
    return _rows(dimage)


def _window(space):
    """2 in every axis; in video, (T, H, W), time is kept."""
    return (1, 2, 2) if len(space) == 3 else (2,) * len(space)


def _check(x, params, mode, pool, stats):
    where, space = "non_local.forward:", x.shape[2:]
    expect(mode in MODES, f"{where} mode", mode, f"one of {', '.join(MODES)}")
    expect(pool in ("before", "after", None), f"{where} pool", pool, '"before", "after" or None')
    for name, due in (("theta", mode != "gaussian"), ("phi", mode != "gaussian"), ("concat", mode == "concatenation")):
        given = getattr(params, name) is not None
        expected = f"{'an array or Params' if due else 'None'}, since mode is {mode!r}"
        expect(given == due, f"{where} params.{name}", "given" if given else None, expected)
    expect(params.norm is not None or stats is None, f"{where} stats", stats, "None without params.norm")
    if pool is not None:
        expect(1 <= len(space) <= 3, f"{where} x.shape", x.shape, "1 to 3 axes of space, to be pooled")
        fits = all(s >= w for s, w in zip(space, _window(space)))
        expect(fits, f"{where} x.shape", x.shape, f"space of at least {_window(space)}, the window of the pooling")


def example(draw):
    """No two pixels of a window are alike and no weight is 0: where values tie, there is no second derivative.

    eps is large: with a small one, nearly equal values become a gradient that is all rounding.
    """
    mode, pool = draw.choice("mode", *MODES), draw.choice("pool", "before", "after", None)
    axes, low = draw.choice("axes", 1, 2, 3), 1 if pool is None else 2
    space = tuple(draw.size(f"S{i}", low=1 if axes == 3 and i == 0 else low, high=3) for i in range(axes))
    norm = draw.choice("norm", "none", "training", "inference")
    channels, bias = draw.size("C", high=3), draw.choice("bias", True, False)
    params = init(draw.rng, channels, draw.size("K", high=3), mode=mode, bias=bias, norm=norm != "none")
    params = tree_map(lambda p: p / 4 + 1 / 128, draw.like(params))
    x = draw.array(draw.size("N", low=2 if norm == "training" else 1, high=2), channels, *space)
    x = x + (np.arange(x.size) % 23).reshape(x.shape) / 23
    options = {"mode": mode, "pool": pool, "scale": draw.choice("scale", True, False)}
    if norm == "inference":
        options["stats"] = batch_norm.example_stats(draw, channels)
    return Call((x, params), options | {"eps": draw.choice("eps", 0.01, 0.5)})


ABOUT = About(weights="weights", witnesses=("authors' code", "framework", "definition", "relation"))
