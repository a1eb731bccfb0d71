"""MLX, on the CPU: its arrays in and out, gradients by mx.vjp, and what of it is cross-checked.

A target is a function called like the reference's forward, but with MLX's arrays.
"""

import ml_dtypes
import mlx.core as mx
import numpy as np

from refattn.core import leaves, tree_map
from refattn.frameworks import Target
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32
from refattn.oracle.contract import Departure, NotHandled

VERSION = mx.__version__
DTYPES = {"float64": mx.float64, "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def run(candidate, args, options, dout):
    """Call it with MLX's arrays: (result, gradients) in NumPy; no gradients where dout is None."""
    with mx.stream(mx.cpu):
        return _run(candidate, args, options, dout)


def _run(candidate, args, options, dout):
    args = tree_map(_mlx, tuple(args))
    options = {name: tree_map(_mlx, value) for name, value in options.items()}
    if dout is None:
        return _plain(candidate(*args, **options)), None
    found = douts = None

    def differentiable(*inputs):
        nonlocal found, douts
        inputs = iter(inputs)
        found = candidate(*tree_map(lambda x: next(inputs), args), **options)
        found = tuple(found) if isinstance(found, list) else found
        pairs = [(y, _mlx(d)) for (_, y), (_, d) in zip(leaves(found), leaves(dout)) if _differentiable(y, d)]
        douts = [d for _, d in pairs]
        return [y for y, _ in pairs]

    inputs = [x for _, x in leaves(args)]
    differentiable(*inputs)
    result = _plain(found)
    if not douts:
        return result, tree_map(lambda x: None, args)
    _, grads = mx.vjp(differentiable, inputs, douts)
    grads = iter(grads)
    return result, tree_map(lambda x: _array(next(grads)), args)


def _mlx(x):
    return mx.array(x, dtype=DTYPES.get(x.dtype.name)) if isinstance(x, np.ndarray) else x


def _differentiable(y, d):
    return isinstance(y, mx.array) and y.shape == d.shape and y.dtype == DTYPES[d.dtype.name]


def _plain(result):
    result = tuple(result) if isinstance(result, list) else result
    return tree_map(lambda y: _array(y) if isinstance(y, mx.array) else y, result)


def _array(x):
    return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16) if x.dtype == mx.bfloat16 else np.array(x)


# --- the targets ---------------------------------------------------------------------------------------------


def dot_product_attention(q, k, v, attn_bias=None, sinks=None, *, attn_mask=None, is_causal=False, scale=None):
    if attn_bias is not None and attn_mask is not None:
        raise NotHandled("a mask and a bias at once: MLX has one argument for both")
    mask = attn_mask if attn_bias is None else attn_bias
    if is_causal and mask is not None:
        raise NotHandled("causal, and a mask or a bias")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = "causal" if is_causal else mask
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"

# exp (mlx/backend/cpu/simd/math.h) is of float32 also for float64, multiplies by a rounded log2(e), and is 0 below -88.
EXP = {
    "float64": ARITHMETICS["float64"]._replace(
        name="float64, exp of float32", softmax=FLOAT32, exp_error=4 * FLOAT32.u, flush=True
    ),
    "float32": ARITHMETICS["float32"]._replace(name="float32, flush", flush=True),
}

TARGETS = (
    Target(
        "fast.scaled_dot_product_attention",
        "dot_product_attention",
        dot_product_attention,
        dtypes=EVERY_DTYPE,
        arithmetic=EXP,
        convention="mlx",
        times=3,
    ),
)
