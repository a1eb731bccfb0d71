r"""Number formats, and what a kernel does in which of them: the promise that it is judged by.

    x                                         a real number
    fl(x) = x (1 + d), |d| <= u               rounded to nearest; u = 2^-precision, twice that where it truncates
    |fl(x) - x| <= eta                        below the smallest normal number; `tiny` itself where it flushes to zero

An Arithmetic says where an attention kernel rounds, and to what. The names in the comments are those of
dot_product_attention: scores s, probabilities p, their gradients dp and ds. What is None is not rounded there beyond
the accumulator. Of every other mechanism `out`, `grad` and `accumulator` are read: the result of every operation is
rounded to what is stored, sums and products are accumulated first.

    ARITHMETICS["bf16_flash"]                       bfloat16 in and out, float32 inside, P and dS cast for the products
    ARITHMETICS["bf16_flash"]._replace(chain=256)   and no sum longer than 256 terms without a fresh accumulator
"""

import math
from typing import NamedTuple

import numpy as np


class Format(NamedTuple):
    """A floating-point format."""

    name: str
    precision: int  # bits of the significand, the leading one included
    least: int  # exponent of the smallest normal number
    largest: float

    @property
    def u(self):
        """Unit roundoff: half the gap between 1 and the next number."""
        return 2.0**-self.precision

    @property
    def tiny(self):
        """The smallest normal number."""
        return 2.0**self.least

    @property
    def eta(self):
        """Half the smallest subnormal number: the largest error of gradual underflow."""
        return math.ldexp(1.0, max(self.least - self.precision, -1074))


FLOAT64 = Format("float64", 53, -1022, float(np.finfo(np.float64).max))
FLOAT32 = Format("float32", 24, -126, float(np.finfo(np.float32).max))
TFLOAT32 = Format("tfloat32", 11, -126, 2.0**128 * (1 - 2.0**-11))  # what tensor cores read of a float32
BFLOAT16 = Format("bfloat16", 8, -126, 2.0**128 * (1 - 2.0**-8))
FLOAT16 = Format("float16", 11, -14, 65504.0)
FLOAT8_E4M3 = Format("float8_e4m3fn", 4, -6, 448.0)
FLOAT8_E5M2 = Format("float8_e5m2", 3, -14, 57344.0)
FP8_ACCUMULATOR = Format("e8m13", 14, -126, 2.0**128 * (1 - 2.0**-14))  # of Hopper's 8-bit tensor cores

FORMATS = {
    f.name: f
    for f in (FLOAT64, FLOAT32, TFLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FP8_ACCUMULATOR)
}


def round_to(x, form, *, truncate=False):
    """x, rounded to a format and back: to the nearest, ties to even, or toward zero; inf beyond the largest number."""
    x = np.asarray(x)
    if form is None or x.dtype.kind != "f" or form.precision >= np.finfo(x.dtype).nmant + 1:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        if form.name in ("float32", "float16") and not truncate:
            return x.astype(form.name).astype(x.dtype)
        shift = form.precision - np.maximum(np.frexp(x)[1], form.least + 1)
        y = np.ldexp((np.trunc if truncate else np.rint)(np.ldexp(x, shift)), -shift)
        y = np.where(np.abs(y) > form.largest, np.copysign(form.largest if truncate else np.inf, y), y)
        return np.where(np.isfinite(x), y, x).astype(x.dtype)


def half_ulp(x, form):
    """Half the distance from |x| to the next number of a format: the most that rounding x to it can be off."""
    exponent = np.where(x == 0, form.least, np.maximum(np.frexp(x)[1] - 1, form.least))
    return np.ldexp(np.asarray(1.0, np.asarray(x).dtype), exponent - form.precision)


def numpy_dtype(form):
    """The dtype that stores a format; bfloat16 and the 8-bit ones come from ml_dtypes."""
    if form.name in ("float64", "float32", "float16"):
        return np.dtype(form.name)
    if form.name in ("tfloat32", "e8m13"):
        return np.dtype(np.float32)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(f"arrays of {form.name} need ml_dtypes ({error}): pip install 'refattn[lowp]'") from error
    return np.dtype(getattr(ml_dtypes, form.name))


class Arithmetic(NamedTuple):
    """Where a kernel rounds."""

    name: str = "float32"
    inputs: Format = FLOAT32  # of q, k, v, biases and the gradient of the output
    out: Format = FLOAT32
    grad: Format = FLOAT32
    lse: Format = FLOAT32
    accumulator: Format = FLOAT32  # of every matrix product
    accumulator_truncates: bool = False  # as tensor cores do
    operands: Format | None = None  # of every matrix product
    operands_truncate: bool = False
    scaled_query: Format | None = None  # scale q, before its product with k
    scores: Format | None = None
    score_roundings: int = 1  # how often scores are stored: after the product, the scale, the bias
    softmax: Format = FLOAT32  # subtract, exp, add, divide; and the sum D = sum dp p
    exp_error: float = 4 * FLOAT32.u  # relative, of exp: 2 units in the last place
    tanh_error: float = 8 * FLOAT32.u
    probs: Format | None = None  # p, before its product with v, and with dy
    probs_in_dscores: bool = False  # that p is also the one in ds = p (dp - D)
    probs_normalised: bool = False  # p is divided by its sum before it is rounded
    dprobs: Format | None = None  # dp
    dscores: Format | None = None  # ds, before its products with k and q
    scaled_dscores: bool = False  # that ds is scaled before it is rounded, not its products after it
    saved_out: Format | None = None  # the y in D = sum y dy; None: `out`
    shared_heads: Format | None = None  # dk and dv of each query head, before those that share a head are summed
    partial: Format | None = None  # running sums of dq, dk, dv, whenever a tile is done
    partial_queries: int = 64  # queries in such a tile
    partial_keys: int = 512  # keys
    tile: int = 16  # keys in a tile at least; none is the case of one tile more
    chain: int | None = None  # additions in a row at most; None: as many as there are terms
    splits: int = 1  # parts of the keys that are computed apart and merged
    flush: bool = False  # what is smaller than a normal number becomes 0

    @property
    def dtype(self):
        """The NumPy dtype of arrays."""
        return numpy_dtype(self.inputs)


def _stored(name, form, **more):
    return Arithmetic(name, inputs=form, out=form, grad=form, **more)


def _eager(name, form, **more):
    """One framework operation after the other, each result stored."""
    return _stored(
        *(name, form),
        **{"scaled_query": form, "scores": form, "score_roundings": 3, "probs": form, "probs_in_dscores": True}
        | {"probs_normalised": True, "dprobs": form, "dscores": form, "shared_heads": form}
        | more,
    )


def _flash(name, form, **more):
    """One fused kernel: float32 inside, p and ds cast for the tensor cores."""
    return _stored(name, form, **{"probs": form, "dscores": form} | more)


PRESETS = (
    Arithmetic(
        *("float64", FLOAT64, FLOAT64, FLOAT64, FLOAT64, FLOAT64),
        **{"softmax": FLOAT64, "exp_error": 4 * FLOAT64.u, "tanh_error": 8 * FLOAT64.u},
    ),
    _stored("float32", FLOAT32),
    _stored("tf32", FLOAT32, operands=TFLOAT32, operands_truncate=True, probs=TFLOAT32, dscores=TFLOAT32),
    _stored("bf16_upcast", BFLOAT16),
    _flash("bf16_flash", BFLOAT16),
    _eager("bf16_eager", BFLOAT16),
    _stored("f16_upcast", FLOAT16),
    _flash("f16_flash", FLOAT16),
    _eager("f16_eager", FLOAT16),
    Arithmetic("fp8_flash", FLOAT8_E4M3, BFLOAT16, BFLOAT16, probs=FLOAT8_E4M3, dscores=BFLOAT16),
    # What runs on a CPU, as measured (docs/explanation/rounding.md): torch 2.13's fused kernel keeps running sums of
    # dk and dv in the storage format, and its exp for 16 bits is off by up to 1e-4, exp(0) by 5e-5; JAX 0.10 casts p,
    # and keeps scores in float32; ONNX Runtime 1.32 is eager.
    _stored("torch_cpu_float32", FLOAT32),
    *(
        _flash(f"torch_cpu_{f.name}", f, shared_heads=f, partial=f, partial_queries=32, exp_error=2.0**-13)
        for f in (BFLOAT16, FLOAT16)
    ),
    _stored("jax_cpu_float32", FLOAT32),
    _eager("jax_cpu_bfloat16", BFLOAT16, scaled_query=None, scores=None),
    _stored("onnxruntime_cpu_float32", FLOAT32),
    _eager("onnxruntime_cpu_float16", FLOAT16),
)
ARITHMETICS = {a.name: a for a in PRESETS}
OF_DTYPE = {"float64": "float64", "float32": "float32", "float16": "f16_eager", "bfloat16": "bf16_eager"}


def ladder(a):
    """Yield (words, Arithmetic), each coarser than what was promised: which of them explains what came out?"""
    wide = a.out.precision >= FLOAT32.precision
    for low in (FLOAT32,) * (a.softmax == FLOAT64) + (TFLOAT32, BFLOAT16, FLOAT16) if wide else (a.out,):
        of = f"of {low.name}"
        partial = a._replace(partial=low, partial_queries=16, partial_keys=16, shared_heads=low)
        yield f"running sums {of} in the gradients", partial
        yield f"operands {of} in the products", a._replace(operands=low, operands_truncate=True)
        yield f"p and ds {of}", a._replace(probs=low, dscores=low, shared_heads=low)
        stored = _eager(a.name, low)._replace(inputs=a.inputs, out=a.out, grad=a.grad)
        yield f"every result stored as {low.name}", stored
        softmax = stored._replace(softmax=low, exp_error=4 * low.u, tanh_error=8 * low.u)
        yield f"every result stored, and softmax computed, as {low.name}", softmax
        yield f"sums {of}", stored._replace(accumulator=low, partial=low, partial_queries=16, partial_keys=16)
