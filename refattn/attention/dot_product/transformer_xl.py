r"""Relative attention with memory (Transformer-XL).

Causal attention whose scores see what the key is and how far back it stands, each with a bias of its own. Keys and
values begin with those of a memory, the segments before.

Paper: Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", ACL 2019
    (arXiv:1901.02860), section 3.3.

Shapes
    B items, H heads, Q queries, K = M + Q keys, of which the first M are memory, D features of a query or key,
    E features of a value, P features of a sinusoid (an even number).

Forward, key j standing n = i + M - j steps before query i
    R_n = [sin(n theta), cos(n theta)]        theta_i = 10000^(-2i / P), as in sinusoidal
    r_n = W_r R_n                             for every head
    S_ij = scale ((q_i + u) . k_j + (q_i + v) . r_n)      scale is 1 / sqrt(D): terms (a) to (d) of A^rel
    P = softmax(S)                            row by row, over the keys with n >= 0 that the mask allows
    Y = P V

Backward, with a bar for "gradient of the loss with respect to"; C and N are the two products in S, N by distance
    Pbar = Ybar V^T,        Vbar = P^T Ybar
    Cbar = scale P (Pbar - sum_j Pbar P)      softmax, row by row
    Nbar_in = Cbar_ij                         where n = i + M - j: shifted back, 0 where no key stands
    Kbar = Cbar^T (Q + u),                    rbar = sum over items of Nbar^T (Q + v)
    ubar = sum over items and queries of Cbar K,      vbar the same of Nbar r
    Qbar = Cbar K + Nbar r,                   W_rbar = rbar R^T

Choices
    Q, K and V are what the layer makes of its input and the memory: k and v of all M + Q. The authors stop the
    gradient of the memory; here it is there, kbar[:, :, :M] and vbar[:, :, :M], to be dropped.
    Sines come first, then cosines, as in the authors' code. clamp treats what is further away as that far
    (clamp_len there, off by default). u and v may be shared by layers.
    The code's relative shift, which pads, reshapes and cuts, looks up the same numbers where n >= 0; what it puts
    where n < 0 is masked.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import sinusoidal
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import softmax


class Params(NamedTuple):
    u: Shaped[Array, "H D"]
    v: Shaped[Array, "H D"]
    w_r: Shaped[Array, "H D P"]


class Saved(NamedTuple):
    q: Shaped[Array, "B H Q D"]
    k: Shaped[Array, "B H K D"]
    v: Shaped[Array, "B H K E"]
    params: Params
    waves: Shaped[Array, "K P"]  # R, by distance
    r: Shaped[Array, "H K D"]  # by distance
    attn: Shaped[Array, "B H Q K"]
    scale: float


def init(rng, heads, features, inputs):
    """Normal of standard deviation 0.02, all of it, as the authors' script."""
    shapes = (heads, features), (heads, features), (heads, features, inputs)
    return Params(*(0.02 * rng.normal(size=shape) for shape in shapes))


@shaped
def forward(
    q: Shaped[Array, "B H Q D"],
    k: Shaped[Array, "B H K D"],
    v: Shaped[Array, "B H K E"],
    params: Params,
    *,
    scale: float | None = None,
    mask: Shaped[Bools, "B H Q K"] | None = None,
    clamp: int | None = None,
) -> tuple[Shaped[Array, "B H Q E"], Saved]:
    where, (queries, features), keys, inputs = "transformer_xl.forward:", q.shape[2:], k.shape[2], params.w_r.shape[2]
    expect(features > 0, f"{where} q.shape", q.shape, "at least one feature")
    expect(keys >= queries, f"{where} k.shape", k.shape, f"at least {queries} keys, one for each query")
    expect(inputs > 0 and inputs % 2 == 0, f"{where} params.w_r.shape", params.w_r.shape, "a positive even P")
    expect(clamp is None or clamp >= 0, f"{where} clamp", clamp, "None, or at least 0")
    scale = 1 / math.sqrt(features) if scale is None else float(scale)
    expect(math.isfinite(scale), f"{where} scale", scale, "a finite number, or None")
    distances = np.arange(keys) if clamp is None else np.minimum(np.arange(keys), clamp)
    waves = sinusoidal.waves(distances, inputs, layout="concatenated").astype(q.real.dtype)
    r = np.einsum("hdp,np->hnd", params.w_r, waves)
    content = (q + params.u[:, None]) @ k.swapaxes(2, 3)
    position = (q + params.v[:, None]) @ r.swapaxes(1, 2)
    past = np.tri(queries, keys, keys - queries, bool)
    allowed = np.broadcast_to(past, content.shape) if mask is None else mask & past
    attn, _ = softmax.forward(scale * (content + _shift(position)), mask=allowed)
    return attn @ v, Saved(q, k, v, params, waves, r, attn, scale)


@shaped
def backward(
    dy: Shaped[Array, "B H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B H Q D"], Shaped[Array, "B H K D"], Shaped[Array, "B H K E"], Params]:
    q, k, v, params, waves, r, attn, scale = saved
    dattn, dv = dy @ v.swapaxes(2, 3), attn.swapaxes(2, 3) @ dy
    (dscores,) = softmax.backward(dattn, softmax.Saved(attn, axis=-1))
    dcontent = scale * dscores
    dposition = _shift(dcontent)
    dk = dcontent.swapaxes(2, 3) @ (q + params.u[:, None])
    dr = (dposition.swapaxes(2, 3) @ (q + params.v[:, None])).sum(axis=0)
    by_content, by_position = dcontent @ k, dposition @ r
    dw_r = np.einsum("hnd,np->hdp", dr, waves)
    return by_content + by_position, dk, dv, Params(by_content.sum(axis=(0, 2)), by_position.sum(axis=(0, 2)), dw_r)


def _shift(x):
    """x (B, H, Q, K) at n = i + M - j instead of j, and 0 where n < 0. The map is its own transpose."""
    queries, keys = x.shape[2:]
    n = np.arange(queries)[:, None] + (keys - queries) - np.arange(keys)
    return np.where(n >= 0, np.take_along_axis(x, np.maximum(n, 0)[None, None], axis=3), 0)


def example(draw):
    b, heads, queries = draw.size("B", high=2), draw.size("H", high=2), draw.size("Q", high=3)
    memory = draw.size("M", low=0, high=2)
    features, values, inputs = draw.size("D", high=3), draw.size("E", high=2), 2 * draw.size("P / 2", high=2)
    keys = memory + queries
    params = draw.like(init(draw.rng, heads, features, inputs))
    options = {
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "clamp": draw.choice("clamp", None, 1),
    }
    arrays = (queries, features), (keys, features), (keys, values)
    return Call((*(draw.array(b, heads, *shape) for shape in arrays), params), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("definition", "relation"),
)
