r"""Softmax of noisy scores along one axis, with a temperature.

With Gumbel noise the largest entry is drawn with the probabilities softmax(s); the lower the temperature, the closer p
comes to saying 1 there and 0 elsewhere.

Paper: Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017 (arXiv:1611.01144), and
Maddison, Mnih and Teh, "The Concrete Distribution", ICLR 2017 (arXiv:1611.00712).

Forward
    z = (s + noise) / temperature
    p = softmax(z)                            over allowed entries;  0 elsewhere

Backward, with a bar for "gradient of the loss with respect to"
    zbar_i = p_i (pbar_i - sum_j pbar_j p_j)
    sbar   = zbar / temperature

Choices
    noise is given, since nothing here draws: rng.gumbel(size=s.shape), which is -log(-log u) of uniform u. It has no
    gradient of its own; it would be sbar. Without noise this is softmax with a temperature.
    There is no hard=True (torch): its straight-through gradient is not the derivative of its output. Who wants it takes
    the largest entry of p as one-hot output, and gives this backward its gradient.
"""

import math
from typing import NamedTuple

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import softmax


class Saved(NamedTuple):
    p: Shaped[Array, "*S"]
    axis: int
    temperature: float


@shaped
def forward(
    s: Shaped[Array, "*S"],
    *,
    noise: Shaped[Array, "*S"] | None = None,
    temperature: float = 1.0,
    axis: int = -1,
    mask: Shaped[Bools, "*S"] | None = None,
) -> tuple[Shaped[Array, "*S"], Saved]:
    good = 0 < temperature < math.inf
    expect(good, "gumbel_softmax.forward: temperature", temperature, "a positive number")
    expect(-s.ndim <= axis < s.ndim, "gumbel_softmax.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    z = (s if noise is None else s + noise) / float(temperature)
    p, _ = softmax.forward(z, axis=axis, mask=mask)
    return p, Saved(p, axis, float(temperature))


@shaped
def backward(dp: Shaped[Array, "*S"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    p, axis, temperature = saved
    (dz,) = softmax.backward(dp, softmax.Saved(p, axis))
    return (dz / temperature,)


def example(draw):
    shape = draw.size("A"), draw.size("B", high=5), draw.size("C")
    options = {
        "noise": draw.array(*shape) if draw.choice("noisy", True, False) else None,
        "temperature": draw.choice("temperature", 1.0, 0.5, 2.5),
        "axis": draw.choice("axis", -1, 1, 0),
        "mask": draw.mask(*shape) if draw.choice("masked", False, True) else None,
    }
    return Call((draw.array(*shape),), options)


ABOUT = About(weights="p", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
