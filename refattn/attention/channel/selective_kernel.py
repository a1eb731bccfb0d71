r"""Selective kernel convolution (SK).

Convolve with several kernels of different reach, and let every channel choose between them by what the image shows.

Paper: Li, Wang, Hu and Yang, "Selective Kernel Networks", CVPR 2019 (arXiv:1903.06586), section 3.1.

Shapes
    N images, I channels and H by W pixels in, C channels and P by Q pixels out; M branches,
    D = max(C / reduction, 32) hidden units.

Forward
    u_m    = max(batch_norm(conv_m(x)), 0)    split: one map (N, C, P, Q) for every branch m
    z_nc   = mean over pixels of sum_m u_m    fuse
    q      = max(batch_norm(W1 z), 0)
    l_nmc  = W2 q                             the C logits of the first branch first
    a_ncm  = softmax over m of l_nmc          select
    y_ncij = sum_m a_ncm u_mncij

Backward, with a bar for "gradient of the loss with respect to"
    abar_ncm = sum_ij ybar_ncij u_mncij
    lbar_nmc = a_ncm (abar_ncm - sum_m a_ncm abar_ncm)
    qbar = lbar W2,   zbar = gradient of max(batch_norm(W1 z), 0)
    ubar_m   = a_ncm ybar_ncij + zbar_nc / (PQ)       every branch is used twice: selected, and averaged
    xbar     = sum_m gradient of max(batch_norm(conv_m(x)), 0)

Choices
    dilations: the paper speaks of kernels 3 and 5, and means 3 and 3 with dilation 2, as in the authors' code. Kernels
    of any odd size may be given in Params; padding keeps the size.
    split_input: every branch convolves its own M-th of the channels (a default in timm) instead of all of them.
    stats=None is training, given Stats are inference. The normalisation of q sees one value for every image, so that
    training needs N > 1.
    The authors' convolutions and linear maps have no biases; where Params has them, they count.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import batch_norm, conv_norm_relu, linear, softmax


class Params(NamedTuple):
    branches: tuple[conv_norm_relu.Params, ...]
    squeeze: conv_norm_relu.Params  # W1 (D, C): a convolution without space is a linear map
    select: linear.Params  # W2 (M C, D)


class Stats(NamedTuple):
    branches: tuple[batch_norm.Stats, ...]
    squeeze: batch_norm.Stats


class Saved(NamedTuple):
    branches: tuple[conv_norm_relu.Saved, ...]
    squeeze: conv_norm_relu.Saved
    select: linear.Saved
    attention: Shaped[Array, "N C M"]
    split_input: bool


def init(rng, inputs, outputs, kernels=(3, 3), groups=32, reduction=16, least=32, split_input=False):
    """Each part as its own file starts it, without biases; one kernel per branch, D = max(C / reduction, least)."""
    hidden, inputs = max(outputs // reduction, least), inputs // len(kernels) if split_input else inputs
    return Params(
        branches=tuple(conv_norm_relu.init(rng, inputs, outputs, (k, k), groups) for k in kernels),
        squeeze=conv_norm_relu.init(rng, outputs, hidden, ()),
        select=linear.init(rng, hidden, len(kernels) * outputs, bias=False),
    )


def init_stats(params):
    """The running statistics before the first batch: mean 0, variance 1."""
    squeeze, *branches = (batch_norm.init_stats(len(p.norm.gamma)) for p in (params.squeeze, *params.branches))
    return Stats(tuple(branches), squeeze)


@shaped
def forward(
    x: Shaped[Array, "N I H W"],
    params: Params,
    *,
    stride: int = 1,
    dilations: tuple = (1, 2),
    groups: int = 32,
    split_input: bool = False,
    stats: Stats | None = None,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "N C P Q"], Saved]:
    count = len(params.branches)
    _check(x, params, dilations, split_input, stats)
    stats = stats or Stats((None,) * count, None)
    inputs = np.split(x, count, axis=1) if split_input else [x] * count
    branches = []
    for m, branch in enumerate(params.branches):
        padding = tuple(dilations[m] * (k - 1) // 2 for k in branch.conv.weight.shape[2:])
        geometry = {"stride": stride, "padding": padding, "dilation": dilations[m], "groups": groups}
        branches.append(conv_norm_relu.forward(inputs[m], branch, stats=stats.branches[m], eps=eps, **geometry))
    maps, saved_branches = zip(*branches)
    z = sum(u.mean(axis=(2, 3)) for u in maps)
    q, squeeze = conv_norm_relu.forward(z, params.squeeze, stats=stats.squeeze, eps=eps)
    logits, select = linear.forward(q, params.select)
    attention, _ = softmax.forward(logits.reshape(z.shape[0], count, z.shape[1]).swapaxes(1, 2))
    y = sum(attention[:, :, m, None, None] * u for m, u in enumerate(maps))
    return y, Saved(saved_branches, squeeze, select, attention, split_input)


@shaped
def backward(dy: Shaped[Array, "N C P Q"], saved: Saved) -> tuple[Shaped[Array, "N I H W"], Params]:
    branches, squeeze, select, attention, split_input = saved
    n, channels, count = attention.shape
    dattention = np.stack([np.einsum("ncpq,ncpq->nc", dy, branch.y) for branch in branches], axis=2)
    dlogits = attention * (dattention - (attention * dattention).sum(axis=2, keepdims=True))
    dq, dselect = linear.backward(dlogits.swapaxes(1, 2).reshape(n, count * channels), select)
    dz, dsqueeze = conv_norm_relu.backward(dq, squeeze)
    dmean = (dz / (dy.shape[2] * dy.shape[3]))[:, :, None, None]
    dbranches = []
    for m, branch in enumerate(branches):
        du = attention[:, :, m, None, None] * dy
        du += dmean
        dbranches.append(conv_norm_relu.backward(du, branch))
    dinputs, dparams = zip(*dbranches)
    dx = np.concatenate(dinputs, axis=1) if split_input else sum(dinputs)
    return dx, Params(dparams, dsqueeze, dselect)


def _check(x, params, dilations, split_input, stats):
    where, count = "selective_kernel.forward:", len(params.branches)
    expect(count >= 2, f"{where} len(params.branches)", count, "at least 2")
    expect(len(dilations) == count, f"{where} dilations", dilations, f"{count} of them, one per branch")
    every = None if stats is None else len(stats.branches)
    expect(every in (None, count), f"{where} len(stats.branches)", every, f"{count}, one per branch")
    fits = not split_input or x.shape[1] % count == 0
    expect(fits, f"{where} x.shape", x.shape, f"a multiple of {count} channels, which split_input splits")
    channels = params.squeeze.conv.weight.shape[1]
    for m, branch in enumerate(params.branches):
        shape = branch.conv.weight.shape
        fits = shape[0] == channels and all(k % 2 for k in shape[2:])
        expected = f"C = {channels} from params.squeeze, and an odd kernel"
        expect(fits, f"{where} params.branches[{m}].conv.weight.shape", shape, expected)
    shape = params.select.weight.shape
    expect(shape[0] == count * channels, f"{where} params.select.weight.shape", shape, f"M C = {count * channels} rows")


def example(draw):
    count, groups, split_input = draw.choice("M", 2, 3), draw.choice("groups", 1, 2), draw.choice("split", False, True)
    kernels = tuple(draw.choice(f"K{m}", 3, 1) for m in range(count))
    inputs = groups * draw.size("I / groups", high=2) * (count if split_input else 1)
    outputs = groups * draw.size("C / groups", high=2)
    params = init(draw.rng, inputs, outputs, kernels, groups, reduction=1, least=2, split_input=split_input)
    options = {"stride": draw.choice("stride", 1, 2), "groups": groups, "split_input": split_input}
    options["dilations"] = tuple(draw.size(f"dilation {m}", high=3) for m in range(count))
    training = draw.choice("training", True, False)
    options["stats"] = None if training else _example_stats(draw, params)
    options["eps"] = 0.1 if training else 1e-5  # rounding grows by 1 / sqrt(eps) where a batch has no variance
    x = draw.array(draw.size("N", low=3 if training else 1), inputs, draw.size("H", high=3), draw.size("W", high=3))
    params = tree_map(lambda p: p / 4 + 33 / 128, draw.like(params))  # never 0, where a ReLU has its kink
    return Call((x, params), options)


def _example_stats(draw, params):
    branches, squeeze = draw.like(init_stats(params))
    *branches, squeeze = (s._replace(var=s.var**2 + 0.5) for s in (*branches, squeeze))
    return Stats(tuple(branches), squeeze)


ABOUT = About(
    weights="attention",
    laws=("weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("authors' code", "framework", "definition", "relation"),
)
