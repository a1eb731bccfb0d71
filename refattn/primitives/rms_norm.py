r"""Root mean square normalisation.

Scale every vector to mean square 1, then to what gamma says: layer normalisation that does not shift.

Paper: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019 (arXiv:1910.07467), equation 4.

Shapes
    ... any leading axes, D features.

Forward, with mean() over the features
    r    = 1 / sqrt(mean(x^2) + eps)
    xhat = r x
    y_d  = gamma_d xhat_d

Backward, with a bar for "gradient of the loss with respect to"
    gammabar_d = sum over the leading axes of ybar_d xhat_d
    xhatbar_d  = gamma_d ybar_d
    xbar_d     = r (xhatbar_d - xhat_d mean(xhatbar xhat))

Choices
    The paper has no eps; code puts it inside the root: 1e-6 here, the machine epsilon in torch. eps=0 is allowed
    where no vector is 0. params=None leaves out gamma. Gemma multiplies with 1 + gamma: give it that sum.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Params(NamedTuple):
    gamma: Shaped[Array, "D"]


class Saved(NamedTuple):
    xhat: Shaped[Array, "*L D"]
    r: Shaped[Array, "*L 1"]
    params: Params | None


def init(rng, features):
    """gamma = 1."""
    return Params(np.ones(features))


@shaped
def forward(
    x: Shaped[Array, "*L D"], params: Params | None = None, *, eps: float = 1e-6
) -> tuple[Shaped[Array, "*L D"], Saved]:
    expect(x.shape[-1] > 0, "rms_norm.forward: x.shape", x.shape, "at least one feature")
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    valid = eps > 0 or (eps == 0 and (mean_square != 0).all())
    expect(valid, "rms_norm.forward: eps", eps, "more than 0, or 0 where no mean square is 0")
    r = 1 / np.sqrt(mean_square + eps)
    xhat = r * x
    return xhat if params is None else xhat * params.gamma, Saved(xhat, r, params)


@shaped
def backward(dy: Shaped[Array, "*L D"], saved: Saved) -> tuple[Shaped[Array, "*L D"], Params | None]:
    xhat, r, params = saved
    dxhat, dparams = dy, None
    if params is not None:
        dxhat, dparams = dy * params.gamma, Params((dy * xhat).sum(axis=tuple(range(dy.ndim - 1))))
    return r * (dxhat - xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)), dparams


def example(draw):
    """eps is large: with a small one, a single feature becomes its sign, whose gradient is all rounding."""
    lead = draw.choice("leading axes", (draw.size("L"),), (draw.size("L1"), draw.size("L2", high=3)))
    features = draw.size("D")
    params = draw.like(init(draw.rng, features)) if draw.choice("affine", True, False) else None
    return Call((draw.array(*lead, features), params), {"eps": draw.choice("eps", 0.01, 0.5)})


ABOUT = About(witnesses=("framework", "definition"))
