r"""Layer normalisation.

Shift and scale every item to mean 0 and variance 1 over its own last axes, then to what gamma and beta say.

Paper: Ba, Kiros and Hinton, "Layer Normalization", 2016 (arXiv:1607.06450), section 3.

Shapes
    N items, *S any further axes. The last `axes` of them all, *F, are normalised together; F numbers in all.
    With as many axes as x has, x is one item.

Forward, with sums and means over *F
    mu   = 1/F sum x_f,   v = 1/F sum (x_f - mu)^2
    xhat = (x_f - mu) / sqrt(v + eps)
    y_f  = gamma_f xhat_f + beta_f

Backward, with a bar for "gradient of the loss with respect to"
    gammabar_f = sum ybar_f xhat_f,   betabar_f = sum ybar_f        over all axes but *F
    xhatbar_f  = gamma_f ybar_f
    xbar_f     = (xhatbar_f - mean(xhatbar) - xhat_f mean(xhatbar xhat)) / sqrt(v + eps)

Choices
    The variance divides by F, and eps stands inside the root. One number alone (F = 1) has xhat = 0.
    params=None leaves out gamma and beta, beta=None leaves out beta (torch: elementwise_affine, bias).
    eps=0 is allowed where no variance is 0.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Params(NamedTuple):
    gamma: Shaped[Array, "*F"]
    beta: Shaped[Array, "*F"] | None = None


class Saved(NamedTuple):
    xhat: Shaped[Array, "N *S"]
    inverse_std: Shaped[Array, "*ones"]  # one per item: the normalised axes have length 1
    params: Params | None
    axes: int


def init(rng, *features, bias=True):
    """gamma = 1, beta = 0; `features` are the lengths of the normalised axes."""
    return Params(np.ones(features), np.zeros(features) if bias else None)


@shaped
def forward(
    x: Shaped[Array, "N *S"], params: Params | None = None, *, axes: int = 1, eps: float = 1e-5
) -> tuple[Shaped[Array, "N *S"], Saved]:
    expect(1 <= axes <= x.ndim, "layer_norm.forward: axes", axes, f"from 1 to {x.ndim}, the axes of x")
    features = x.shape[-axes:]
    expect(0 not in features, "layer_norm.forward: x.shape", x.shape, "at least one number to normalise")
    if params is not None:
        gamma = params.gamma.shape
        expect(gamma == features, "layer_norm.forward: params.gamma.shape", gamma, f"{features}, the last axes of x")
    over = tuple(range(-axes, 0))
    centred = x - x.mean(axis=over, keepdims=True)
    variance = (centred * centred).mean(axis=over, keepdims=True)
    valid = eps > 0 or (eps == 0 and (variance != 0).all())
    expect(valid, "layer_norm.forward: eps", eps, "more than 0, or 0 where no variance is 0")
    inverse_std = 1 / np.sqrt(variance + eps)
    xhat = centred * inverse_std
    y = xhat if params is None else xhat * params.gamma
    if params is not None and params.beta is not None:
        y = y + params.beta
    return y, Saved(xhat, inverse_std, params, axes)


@shaped
def backward(dy: Shaped[Array, "N *S"], saved: Saved) -> tuple[Shaped[Array, "N *S"], Params | None]:
    xhat, inverse_std, params, axes = saved
    over, rest = tuple(range(-axes, 0)), tuple(range(dy.ndim - axes))
    dxhat, dparams = dy, None
    if params is not None:
        dbeta = None if params.beta is None else dy.sum(axis=rest)
        dxhat, dparams = dy * params.gamma, Params((dy * xhat).sum(axis=rest), dbeta)
    mean = dxhat.mean(axis=over, keepdims=True)
    along = (dxhat * xhat).mean(axis=over, keepdims=True)
    return (dxhat - mean - xhat * along) * inverse_std, dparams


def example(draw):
    """eps is large: with a small one, two numbers become 1 and -1, whose gradient is all rounding."""
    lead = draw.choice("lead", (draw.size("N"),), (draw.size("N"), draw.size("T", high=3)))
    features = draw.choice("features", (draw.size("F"),), (draw.size("F1", high=3), draw.size("F2", high=3)))
    params = draw.choice("affine", None, init(draw.rng, *features), init(draw.rng, *features, bias=False))
    options = {"axes": len(features), "eps": draw.choice("eps", 0.01, 0.5)}
    return Call((draw.array(*lead, *features), draw.like(params)), options)


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
