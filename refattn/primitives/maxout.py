r"""Maxout: the largest of every few neighbours on the last axis.

Paper: Goodfellow, Warde-Farley, Mirza, Courville and Bengio, "Maxout Networks", ICML 2013 (arXiv:1302.4389).

Shapes
    ... any leading axes, D = P M pieces in, M units out, P = pieces.

Forward
    y_m = max_p x_P m + p

Backward, with a bar for "gradient of the loss with respect to"
    xbar_P m + p = ybar_m where p is the first of the largest, 0 elsewhere

Choices
    The pieces of a unit are neighbours: 0 and 1, 2 and 3, ... where P = 2.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped


class Saved(NamedTuple):
    winner: Shaped[Ints, "*L M 1"]
    pieces: int


@shaped
def forward(x: Shaped[Array, "*L D"], *, pieces: int = 2) -> tuple[Shaped[Array, "*L M"], Saved]:
    width = x.shape[-1]
    expect(isinstance(pieces, int) and pieces > 0, "maxout.forward: pieces", pieces, "a positive int")
    expect(width % pieces == 0, "maxout.forward: pieces", pieces, f"a divisor of D = {width}, from x")
    groups = x.reshape(*x.shape[:-1], width // pieces, pieces)
    winner = groups.real.argmax(axis=-1)[..., None]
    return np.take_along_axis(groups, winner, axis=-1)[..., 0], Saved(winner, pieces)


@shaped
def backward(dy: Shaped[Array, "*L M"], saved: Saved) -> tuple[Shaped[Array, "*L D"]]:
    winner, pieces = saved
    dgroups = np.where(np.arange(pieces) == winner, dy[..., None], 0)
    return (dgroups.reshape(*dy.shape[:-1], dy.shape[-1] * pieces),)


def example(draw):
    lead = draw.choice("leading axes", (draw.size("L"),), (draw.size("L1"), draw.size("L2")))
    pieces = draw.size("pieces", high=3)
    return Call((draw.array(*lead, pieces * draw.size("M", high=3)),), {"pieces": pieces})


ABOUT = About(witnesses=("definition",))
