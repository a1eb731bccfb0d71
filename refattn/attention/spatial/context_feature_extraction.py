r"""Context-aware pyramid feature extraction (PFANet).

Look at every pixel's surroundings at several scales at once: one pointwise and several dilated convolutions, joined.

Paper: Zhao and Wu, "Pyramid Feature Attention Network for Saliency Detection", CVPR 2019 (arXiv:1903.00179),
section 3.1.

Shapes
    N images, C channels, H by W pixels, B branches of F channels each.

Forward, with b over branches and d_b their dilations
    a_b = conv_b(x), zero-padded so that the space stays (H, W)
    u = batch_norm(join of all a_b on channels)
    y = max(u, 0)

Backward, with a bar for "gradient of the loss with respect to"
    ubar = ybar [y > 0]
    abar = batch normalisation's gradient of ubar, cut into its B pieces
    xbar = sum_b the b-th convolution's gradient of abar_b

Choices
    Kernels are 1 x 1, 3 x 3, 3 x 3, 3 x 3, with dilations 1, 3, 5, 7, and have no bias in the release: the
    normalisation would take it out again. One normalisation sees all branches.
    The release normalises by the batch's own statistics in inference too: that is stats=None, the default. Given
    stats are running ones. eps = 1e-3, as in Keras. relu'(0) = 0.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.elementwise import relu
from refattn.primitives import batch_norm, conv


class Params(NamedTuple):
    branches: tuple[Shaped[conv.Params, "I=C O=F"], ...]
    norm: batch_norm.Params


class Saved(NamedTuple):
    branches: tuple[conv.Saved, ...]
    norm: batch_norm.Saved
    y: Shaped[Array, "N M H W"]


def init(rng, channels, filters=32, kernels=(1, 3, 3, 3)):
    """Each part as its own file starts it."""
    branches = tuple(conv.init(rng, channels, filters, (k, k), bias=False) for k in kernels)
    return Params(branches, batch_norm.init(rng, filters * len(kernels)))


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Params,
    *,
    dilations: tuple = (1, 3, 5, 7),
    stats: batch_norm.Stats | None = None,
    eps: float = 1e-3,
) -> tuple[Shaped[Array, "N M H W"], Saved]:
    where, count = "context_feature_extraction.forward:", len(params.branches)
    expect(count > 0, f"{where} params.branches", params.branches, "at least one")
    expect(len(dilations) == count, f"{where} dilations", dilations, f"{count} of them, as params.branches")
    for i, branch in enumerate(params.branches):
        kernel = branch.weight.shape[2:]
        odd = all(k % 2 for k in kernel)
        expect(odd, f"{where} params.branches[{i}].weight.shape", branch.weight.shape, "a kernel with odd sides")
    features, branches = zip(*map(_same_conv, [x] * count, params.branches, dilations))
    u, norm = batch_norm.forward(np.concatenate(features, axis=1), params.norm, stats=stats, eps=eps)
    y = relu(u)
    return y, Saved(branches, norm, y)


@shaped
def backward(dy: Shaped[Array, "N M H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    branches, norm, y = saved
    djoined, dnorm = batch_norm.backward(dy * (y.real > 0), norm)
    dfeatures = np.split(djoined, len(branches), axis=1)
    dxs, dbranches = zip(*map(conv.backward, dfeatures, branches))
    return sum(dxs), Params(dbranches, dnorm)


def _same_conv(x, params, dilation):
    padding = tuple(dilation * (k // 2) for k in params.weight.shape[2:])
    return conv.forward(x, params, padding=padding, dilation=dilation)


def example(draw):
    channels, filters = draw.size("C", high=2), draw.size("F", high=2)
    dilations = draw.choice("dilations", (1, 2), (1, 1, 2), (1, 3, 2, 1))
    x = draw.array(draw.size("N", low=2, high=3), channels, draw.size("H"), draw.size("W"))
    params = draw.like(init(draw.rng, channels, filters, (1, *(3 for _ in dilations[1:]))))
    options = {"dilations": dilations, "eps": draw.choice("eps", 0.01, 0.5)}
    if draw.choice("mode", "training", "inference") == "inference":
        options["stats"] = batch_norm.example_stats(draw, filters * len(dilations))
    return Call((x, params), options)


ABOUT = About(witnesses=("authors' code", "definition", "relation"))
