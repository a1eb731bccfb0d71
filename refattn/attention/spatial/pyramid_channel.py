r"""Channel-wise attention of PFANet.

Squeeze-and-excitation of the joined context features of three scales: every channel scaled by a gate.

Paper: Zhao and Wu, "Pyramid Feature Attention Network for Saliency Detection", CVPR 2019 (arXiv:1903.00179),
section 3.2.

Shapes
    N images, C channels, H by W pixels, R = C / 4 hidden units.

Forward
    g = sigmoid(W2 max(W1 mean_ij(x_ij) + b1, 0) + b2)
    y_ncij = g_nc x_ncij

Backward
    as in squeeze_excitation, which does all the work

Choices
    Params are those of squeeze_excitation: squeeze_excitation.init(rng, channels, reduction=4).
    While training, the release adds the mean of g to its loss; that is no part of this function.
"""

from typing import NamedTuple

from refattn.attention.channel import squeeze_excitation
from refattn.core import About, Array, Call, Shaped, shaped


class Saved(NamedTuple):
    inner: squeeze_excitation.Saved
    gate: Shaped[Array, "N C"]


@shaped
def forward(
    x: Shaped[Array, "N C H W"], params: Shaped[squeeze_excitation.Params, "C=C"]
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    y, inner = squeeze_excitation.forward(x, params)
    return y, Saved(inner, inner.gate)


@shaped
def backward(
    dy: Shaped[Array, "N C H W"], saved: Saved
) -> tuple[Shaped[Array, "N C H W"], squeeze_excitation.Params]:
    return squeeze_excitation.backward(dy, saved.inner)


def example(draw):
    channels = draw.choice("C", 1, 4, 8)
    x = draw.array(draw.size("N", high=3), channels, draw.size("H", high=3), draw.size("W", high=3))
    return Call((x, draw.like(squeeze_excitation.init(draw.rng, channels, reduction=4))), {})


ABOUT = About(
    weights="gate",
    laws=("batch_independent", "weights_in_unit_interval", "pixel_permutation_equivariant"),
    witnesses=("authors' code", "definition", "relation"),
)
