r"""Split attention (ResNeSt).

Convolve to R maps instead of one, and let every channel choose between its R versions by what the image shows.

Paper: Zhang, Wu, Zhang, Zhu, Lin, Zhang, Sun, He, Mueller, Manmatha, Li and Smola, "ResNeSt: Split-Attention Networks",
2020 (arXiv:2004.08955), section 3 and the radix-major form of its appendix.

Shapes
    N images, I channels and H by W pixels in, C channels and P by Q pixels out; R is the radix, K the cardinality
    (groups), which the shapes of W1 and W2 say; D = max(I R / reduction, 32) hidden units.

Forward
    u      = max(batch_norm(conv(x)), 0)      R C channels in K R groups, radix-major: (R, K, C/K)
    z_nc   = mean over pixels of sum_r u_nrc
    h      = max(batch_norm(W1 z + b1), 0)    W1 and W2 in K groups
    l_nkrc = W2 h + b2                        cardinality-major: (K, R, C/K)
    a_ncr  = softmax over r of l_nkrc         R = 1: sigmoid(l)
    y_ncij = sum_r a_ncr u_nrcij

Backward, with a bar for "gradient of the loss with respect to"
    abar_ncr  = sum_ij ybar_ncij u_nrcij
    lbar_nkrc = a_ncr (abar_ncr - sum_r a_ncr abar_ncr)            R = 1: abar a (1 - a)
    hbar = lbar W2,   zbar = gradient of max(batch_norm(W1 z + b1), 0)
    ubar_nrcij = a_ncr ybar_ncij + zbar_nc / (PQ)     every split is used twice: selected, and averaged
    xbar = gradient of max(batch_norm(conv(x)), 0)

Choices
    The authors' code may have no normalisations (both None), and a bias in the convolution or none. Its D counts the
    channels in, and is at least 32. Where l is read in the order of u, radix-major, the result is wrong for K > 1 and
    R > 1; weights that are all the same hide it.
    stats=None is training, given Stats are inference. The normalisation of h sees one value for every image, so that
    training needs N > 1, and b1 before it has no effect and gradient 0.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.elementwise import relu, sigmoid
from refattn.primitives import batch_norm, conv, softmax


class Params(NamedTuple):
    conv: Shaped[conv.Params, "O=RC"]
    fc1: Shaped[conv.Params, "O=D"]  # (D, C / K): a convolution without space is a linear map, in groups
    fc2: Shaped[conv.Params, "O=RC"]  # (R C, D / K)
    norm0: Shaped[batch_norm.Params, "C=RC"] | None = None  # of the convolution
    norm1: Shaped[batch_norm.Params, "C=D"] | None = None  # of fc1


class Stats(NamedTuple):
    norm0: Shaped[batch_norm.Stats, "C=RC"] | None
    norm1: Shaped[batch_norm.Stats, "C=D"] | None


class Saved(NamedTuple):
    conv: conv.Saved
    norm0: batch_norm.Saved | None
    splits: Shaped[Array, "N R C P Q"]
    fc1: conv.Saved
    norm1: batch_norm.Saved | None
    fc2: conv.Saved
    attention: Shaped[Array, "N C R"]


def init(rng, inputs, channels, kernel=3, radix=2, groups=1, reduction=4, least=32, norm=True, bias=False):
    """Each part as its own file starts it; D = max(inputs radix / reduction, least)."""
    hidden, outputs = max(inputs * radix // reduction, least), radix * channels
    return Params(
        conv=conv.init(rng, inputs, outputs, (kernel, kernel), groups * radix, bias),
        fc1=conv.init(rng, channels, hidden, (), groups),
        fc2=conv.init(rng, hidden, outputs, (), groups),
        norm0=batch_norm.init(rng, outputs) if norm else None,
        norm1=batch_norm.init(rng, hidden) if norm else None,
    )


def init_stats(params):
    """The running statistics before the first batch: mean 0, variance 1."""
    return Stats(*(norm and batch_norm.init_stats(len(norm.gamma)) for norm in (params.norm0, params.norm1)))


@shaped
def forward(
    x: Shaped[Array, "N I H W"],
    params: Params,
    *,
    radix: int = 2,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    stats: Stats | None = None,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "N C P Q"], Saved]:
    groups, per_group = _groups(params, radix, stats)
    stats = stats or Stats(None, None)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups * radix}
    a, convolved = conv.forward(x, params.conv, **geometry)
    u, norm0 = _norm_relu(a, params.norm0, stats.norm0, eps)
    splits = u.reshape(u.shape[0], radix, groups * per_group, *u.shape[2:])
    z = splits.mean(axis=(3, 4)).sum(axis=1)
    b, fc1 = conv.forward(z, params.fc1, groups=groups)
    h, norm1 = _norm_relu(b, params.norm1, stats.norm1, eps)
    selected, fc2 = conv.forward(h, params.fc2, groups=groups)
    logits = selected.reshape(-1, groups, radix, per_group).swapaxes(2, 3).reshape(*z.shape, radix)
    attention = softmax.forward(logits)[0] if radix > 1 else sigmoid(logits)
    y = sum(attention[:, :, r, None, None] * splits[:, r] for r in range(radix))
    return y, Saved(convolved, norm0, splits, fc1, norm1, fc2, attention)


@shaped
def backward(dy: Shaped[Array, "N C P Q"], saved: Saved) -> tuple[Shaped[Array, "N I H W"], Params]:
    convolved, norm0, splits, fc1, norm1, fc2, attention = saved
    n, radix, channels, height, width = splits.shape
    groups = fc1.groups
    dattention = np.stack([np.einsum("ncpq,ncpq->nc", dy, splits[:, r]) for r in range(radix)], axis=2)
    if radix > 1:
        dlogits = attention * (dattention - (attention * dattention).sum(axis=2, keepdims=True))
    else:
        dlogits = dattention * attention * (1 - attention)
    dselected = dlogits.reshape(-1, groups, channels // groups, radix).swapaxes(2, 3).reshape(n, radix * channels)
    dh, dfc2 = conv.backward(dselected, fc2)
    db, dnorm1 = _norm_relu_backward(dh, fc2.x, norm1)
    dz, dfc1 = conv.backward(db, fc1)
    du = attention.swapaxes(1, 2)[..., None, None] * dy[:, None]
    du += (dz / (height * width))[:, None, :, None, None]
    flat = n, radix * channels, height, width
    da, dnorm0 = _norm_relu_backward(du.reshape(flat), splits.reshape(flat), norm0)
    dx, dconv = conv.backward(da, convolved)
    return dx, Params(dconv, dfc1, dfc2, dnorm0, dnorm1)


def _norm_relu(a, params, stats, eps):
    saved = None
    if params is not None:
        a, saved = batch_norm.forward(a, params, stats=stats, eps=eps)
    return relu(a), saved


def _norm_relu_backward(dy, y, saved):
    du = dy * (y.real > 0)
    return (du, None) if saved is None else batch_norm.backward(du, saved)


def _groups(params, radix, stats):
    """K and C / K, which the shapes of W1 and W2 say."""
    where, (hidden, per_group) = "split_attention.forward:", params.fc1.weight.shape
    shape = outputs, hidden_per_group = params.fc2.weight.shape
    groups = hidden // max(hidden_per_group, 1)
    expected = f"(R C, D / K), D = {hidden} from params.fc1"
    expect(groups * hidden_per_group == hidden, f"{where} params.fc2.weight.shape", shape, expected)
    expected = f"R C / C = {outputs} / {groups * per_group}, from params.fc2 and params.fc1 in K = {groups} groups"
    expect(radix > 0 and radix * groups * per_group == outputs, f"{where} radix", radix, expected)
    norms = params.norm0, params.norm1
    fits = stats is None or all((norm is None) == (stat is None) for norm, stat in zip(norms, stats))
    expect(fits, f"{where} stats", stats, "statistics for the normalisations in params, and no others")
    return groups, per_group


def example(draw):
    radix, groups, kernel = draw.choice("R", 2, 1, 3), draw.choice("K", 1, 2), draw.choice("kernel", 3, 1)
    inputs, channels = groups * radix * draw.size("I / (K R)", high=2), groups * draw.size("C / K", high=2)
    norm, bias, training = (draw.choice(what, True, False) for what in ("norm", "bias", "training"))
    params = init(draw.rng, inputs, channels, kernel, radix, groups, radix, groups, norm, bias)
    options = {"radix": radix, "stride": draw.choice("stride", 1, 2), "padding": draw.choice("padding", 1, 2, 0)}
    options["dilation"] = draw.size("dilation", high=2)
    options["stats"] = _example_stats(draw, params) if norm and not training else None
    options["eps"] = 0.1 if training else 1e-5  # rounding grows by 1 / sqrt(eps) where a batch has no variance
    least = max(options["dilation"] * (kernel - 1) - 2 * options["padding"], 0)
    space = (least + draw.size(f"{axis} - {least}", high=2) for axis in "HW")
    x = draw.array(draw.size("N", low=3 if norm and training else 1), inputs, *space)
    params = tree_map(lambda p: p / 4 + 33 / 128, draw.like(params))  # never 0, where a ReLU has its kink
    return Call((x, params), options)


def _example_stats(draw, params):
    return Stats(*(s._replace(var=s.var**2 + 0.5) for s in draw.like(init_stats(params))))


ABOUT = About(
    weights="attention",
    laws=("weights_in_unit_interval",),
    witnesses=("authors' code", "framework", "definition", "relation"),
)
