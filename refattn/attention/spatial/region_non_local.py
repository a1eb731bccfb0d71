r"""Region-level non-local block (SAN).

The image is cut into a grid of tiles, and one non-local block looks at each tile for itself.

Paper: Dai, Cai, Zhang, Xia and Zhang, "Second-order Attention Network for Single Image Super-Resolution", CVPR 2019,
section 3.2.

Shapes
    N images, C channels, H by W pixels, cut into grid by grid tiles.

Forward
    y = non_local(x) within every tile: row r of tiles ends before pixel row (r + 1) H // grid, columns alike

Backward, with a bar for "gradient of the loss with respect to"
    xbar within a tile = the gradient of the non-local block there
    thetabar, phibar, gbar, outbar = the sums over the tiles

Choices
    grid=2 is the paper's and the release's. grid=1 is one non-local block of the whole image.
    The block is the embedded Gaussian without scale; the release has biases and no normalisation. A normalisation
    that is given (params.norm) would see one tile at a time.
    pool: "after", as the release runs. Its constructor says sub_sample=False and pools nevertheless, since a layer
    class takes that name's place; None is what was meant. See non_local for "before".
    Params are those of non_local: non_local.init(rng, channels, inner, norm=False).
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.spatial import non_local
from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map


class Saved(NamedTuple):
    tiles: tuple[tuple[non_local.Saved, ...], ...]  # a row of tiles in each


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Shaped[non_local.Params, "C=C"],
    *,
    grid: int = 2,
    pool: str | None = "after",
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    expect(isinstance(grid, int) and grid > 0, "region_non_local.forward: grid", grid, "a positive int")
    least = grid if pool is None else 2 * grid
    fits = min(x.shape[2:]) >= least
    expect(fits, "region_non_local.forward: x.shape", x.shape, f"H and W of at least {least}, for grid={grid}")
    tiles = [[non_local.forward(tile, params, pool=pool, scale=False) for tile in row] for row in _cut(x, grid)]
    y = np.block([[tile for tile, _ in row] for row in tiles])
    return y, Saved(tuple(tuple(saved for _, saved in row) for row in tiles))


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], non_local.Params]:
    rows = zip(_cut(dy, len(saved.tiles)), saved.tiles)
    tiles = [[non_local.backward(*tile) for tile in zip(*row)] for row in rows]
    dx = np.block([[dtile for dtile, _ in row] for row in tiles])
    return dx, tree_map(lambda *parts: sum(parts), *(dparams for row in tiles for _, dparams in row))


def _cut(x, grid):
    """Rows of tiles: views of x."""
    ends = [[i * length // grid for i in range(1, grid)] for length in x.shape[2:]]
    return [np.split(row, ends[1], axis=3) for row in np.split(x, ends[0], axis=2)]


def example(draw):
    """No two pixels of a window are alike and no weight is 0, as in the example of non_local."""
    grid, pool = draw.choice("grid", 2, 1, 3), draw.choice("pool", None, "after", "before")
    least, channels = grid if pool is None else 2 * grid, draw.size("C", high=2)
    space = draw.size("H", least, 2 * least), draw.size("W", least, 2 * least)
    x = draw.array(draw.size("N", high=2), channels, *space)
    x = x + (np.arange(x.size) % 23).reshape(x.shape) / 23
    bias = draw.choice("bias", True, False)
    params = non_local.init(draw.rng, channels, draw.size("K", high=2), bias=bias, norm=False)
    params = tree_map(lambda p: p / 4 + 1 / 128, draw.like(params))
    return Call((x, params), {"grid": grid, "pool": pool})


ABOUT = About(laws=("batch_independent",), witnesses=("authors' code", "definition", "relation"))
