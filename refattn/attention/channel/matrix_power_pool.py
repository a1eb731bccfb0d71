r"""Matrix power normalised covariance pooling.

Replace global average pooling: describe an image by the square root of the covariance of its channels.

Paper: Li, Xie, Wang and Zuo, "Is Second-order Information Helpful for Large-scale Visual Recognition?", ICCV 2017
(arXiv:1703.08050); the root by iteration: Li, Xie, Wang and Gao, CVPR 2018 (arXiv:1712.01034).

Shapes
    N images, C channels, *S any number of spatial axes; T = C (C + 1) / 2 entries of a triangle.

Forward
    s = covariance_pool(x)                    (C, C), symmetric
    r = matrix_sqrt(s)                        K steps of Newton-Schulz, trace-normalised
    y = the entries r_ij with i <= j, row by row

Backward, with a bar for "gradient of the loss with respect to"
    rbar_ij = ybar at (i, j) for i <= j, 0 below the diagonal
    sbar    = the root's gradient of rbar
    xbar    = the covariance's gradient of sbar

Choices
    iterations=5, as in the authors' release. rbar is not symmetric, and need not be: see matrix_sqrt. Entries off the
    diagonal are taken once and not weighed by sqrt(2). A constant image has no variance, and is refused.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, shaped
from refattn.primitives import covariance_pool, matrix_sqrt


class Saved(NamedTuple):
    pooled: covariance_pool.Saved
    rooted: matrix_sqrt.Saved


@shaped
def forward(x: Shaped[Array, "N C *S"], *, iterations: int = 5) -> tuple[Shaped[Array, "N T"], Saved]:
    s, pooled = covariance_pool.forward(x)
    r, rooted = matrix_sqrt.forward(s, iterations=iterations)
    rows, columns = np.triu_indices(x.shape[1])
    return r[:, rows, columns], Saved(pooled, rooted)


@shaped
def backward(dy: Shaped[Array, "N T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"]]:
    dr = np.zeros_like(saved.rooted.y)
    rows, columns = np.triu_indices(dr.shape[1])
    dr[:, rows, columns] = dy
    (ds,) = matrix_sqrt.backward(dr, saved.rooted)
    return covariance_pool.backward(ds, saved.pooled)


def example(draw):
    """No channel is constant, whatever is drawn."""
    space = draw.choice("space", (draw.size("S", low=2),), (draw.size("H", low=2), draw.size("W")))
    x = draw.array(draw.size("N", high=3), draw.size("C", high=3), *space) / 8
    pattern = np.cos(1.7 * np.arange(x.size)).reshape(x.shape)
    return Call((x + pattern,), {"iterations": draw.choice("iterations", 5, 2, 3)})


ABOUT = About(laws=("batch_independent",), witnesses=("definition", "relation"))
