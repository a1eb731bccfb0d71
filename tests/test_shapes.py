"""What `@shaped` accepts and what it says of the rest: cases are data, (call, error, message)."""

from typing import NamedTuple

import numpy as np
import pytest

from refattn.core import Array, Bools, DtypeError, Ints, Shaped, ShapeError, expect, shaped
from refattn.primitives import linear
from refattn.shapes import spelled


class Params(NamedTuple):
    w: Shaped[Array, "R C"]
    b: Shaped[Array, "R"] | None = None


class Chain(NamedTuple):
    first: Shaped[linear.Params, "I=A O=M"]
    second: Shaped[linear.Params, "I=M O=Z"]


class Two(NamedTuple):
    y: Shaped[Array, "N R"]
    z: Shaped[Array, "N"]


@shaped
def gate(x: Shaped[Array, "N C *S"], params: Params, *, mask: Shaped[Bools, "N"] | None = None, eps: float = 0.1):
    return eps


@shaped
def tied(x: Shaped[Array, "N C"], inner: Shaped[linear.Params, "I=C O=R"], other: linear.Params | None = None):
    return x


@shaped
def chained(x: Shaped[Array, "N C"], m: Shaped[Array, "M"], chain: Shaped[Chain, "A=C"]):
    return x


@shaped
def ids(i: Shaped[Ints, "N 2"], layers: tuple[Params, ...] = ()) -> Shaped[Array, "N"]:
    return np.zeros(3)


@shaped
def stretched(x: Shaped[Array, "N C"], y: Shaped[Array, "N? C?"] | Shaped[Array, "C"] | int | str):
    return None


@shaped
def either(x: Shaped[Array, "N C"] | Params):
    return None


@shaped
def pair(x: Shaped[Array, "N R"]) -> tuple[Two, Shaped[Array, ""]]:
    return Two(x, x[:, 0]), x[0, 0]


def z(*shape, dtype=float):
    return np.zeros(shape, dtype)


GOOD = [
    lambda: gate(z(2, 3), Params(z(4, 3))),
    lambda: gate(z(2, 3, 5, 7), Params(z(4, 3), z(4)), mask=z(2, dtype=bool)),
    lambda: gate(z(0, 3), Params(z(4, 3))),
    lambda: gate(z(2, 3, dtype=complex), Params(z(4, 3))),
    lambda: gate(z(2, 3, dtype=np.float32), Params(z(4, 3, dtype=np.complex64))),
    lambda: tied(z(2, 3), linear.Params(z(7, 3)), linear.Params(z(5, 9), z(5))),
    lambda: chained(z(2, 3), z(9), Chain(linear.Params(z(5, 3)), linear.Params(z(4, 5)))),
    lambda: ids(z(3, 2, dtype=int), (Params(z(4, 3)), Params(z(4, 3)))),
    lambda: pair(z(2, 3)),
    lambda: stretched(z(2, 3), z(1, 3)),
    lambda: stretched(z(2, 3), z(2, 1)),
    lambda: stretched(z(2, 3), z(3)),
    lambda: stretched(z(2, 3), 4),
    lambda: stretched(z(2, 3), "all"),
    lambda: either(z(2, 3)),
    lambda: either(Params(z(2, 3))),
]

BAD = [
    (
        lambda: stretched(z(2, 3), z(3, 1)),
        ShapeError,
        "test_shapes.stretched: y has shape (3, 1), expected (N or 1, C or 1); N = 2 from x, C = 3 from x",
    ),
    (lambda: stretched(z(2, 3), z(2)), ShapeError, "test_shapes.stretched: y has shape (2,), expected (C,); C = 3"),
    (lambda: stretched(z(2, 3), 0.5), DtypeError, "test_shapes.stretched: y is a float, expected an array of"),
    (lambda: either((z(2, 3),)), DtypeError, "test_shapes.either: x is a tuple, expected an array of"),
    (lambda: gate(z(2), Params(z(4, 3))), ShapeError, "test_shapes.gate: x has shape (2,), expected (N, C, *S)"),
    (
        lambda: gate(z(2, 3), Params(z(4, 5))),
        ShapeError,
        "test_shapes.gate: params.w has shape (4, 5), expected (R, C); C = 3 from x",
    ),
    (
        lambda: gate(z(2, 3), Params(z(4, 3), z(9))),
        ShapeError,
        "test_shapes.gate: params.b has shape (9,), expected (R,); R = 4 from params.w",
    ),
    (
        lambda: gate(z(2, 3), Params(z(4, 3)), mask=z(3, dtype=bool)),
        ShapeError,
        "test_shapes.gate: mask has shape (3,), expected (N,); N = 2 from x",
    ),
    (
        lambda: chained(z(2, 3), z(9), Chain(linear.Params(z(5, 7)), linear.Params(z(4, 5)))),
        ShapeError,
        "test_shapes.chained: chain.first.weight has shape (5, 7), expected (O, I); I = 3 from x",
    ),
    (
        lambda: chained(z(2, 3), z(9), Chain(linear.Params(z(5, 3)), linear.Params(z(4, 6)))),
        ShapeError,
        "test_shapes.chained: chain.second.weight has shape (4, 6), expected (O, I); I = 5 from chain.first.weight",
    ),
    (
        lambda: gate([[1.0]], Params(z(4, 3))),
        DtypeError,
        "test_shapes.gate: x is a list, expected an array of floating point of shape (N, C, *S)",
    ),
    (
        lambda: gate(None, Params(z(4, 3))),
        DtypeError,
        "test_shapes.gate: x is None, expected an array of floating point of shape (N, C, *S)",
    ),
    (
        lambda: gate(z(2, 3, dtype=int), Params(z(4, 3))),
        DtypeError,
        "test_shapes.gate: x has dtype int64, expected floating point",
    ),
    (
        lambda: gate(z(2, 3, dtype=object), Params(z(4, 3))),
        DtypeError,
        "test_shapes.gate: x has dtype object, expected floating point",
    ),
    (
        lambda: gate(z(2, 3), Params(z(4, 3, dtype=np.float32))),
        DtypeError,
        "test_shapes.gate: params.w has dtype float32, expected the precision of x, float64",
    ),
    (
        lambda: gate(z(2, 3), Params(z(4, 3)), mask=z(2)),
        DtypeError,
        "test_shapes.gate: mask has dtype float64, expected bool",
    ),
    (
        lambda: gate(z(2, 3), (z(4, 3), None)),
        DtypeError,
        "test_shapes.gate: params is a tuple, expected test_shapes.Params(w, b)",
    ),
    (
        lambda: gate(z(2, 3), None),
        DtypeError,
        "test_shapes.gate: params is None, expected test_shapes.Params(w, b)",
    ),
    (
        lambda: gate(np.ma.masked_array(z(2, 3)), Params(z(4, 3))),
        DtypeError,
        "MaskedArray, expected an array of floating point of shape (N, C, *S)",
    ),
    (
        lambda: tied(z(2, 3), linear.Params(z(7, 4))),
        ShapeError,
        "test_shapes.tied: inner.weight has shape (7, 4), expected (O, I); I = 3 from x",
    ),
    (
        lambda: tied(z(2, 3), linear.Params(z(7, 3)), linear.Params(z(5, 9), z(6))),
        ShapeError,
        "test_shapes.tied: other.bias has shape (6,), expected (O,); O = 5 from other.weight",
    ),
    (lambda: ids(z(3, 2)), DtypeError, "test_shapes.ids: i has dtype float64, expected integers"),
    (lambda: ids(z(3, 4, dtype=int)), ShapeError, "test_shapes.ids: i has shape (3, 4), expected (N, 2)"),
    (lambda: ids(z(3, 2, dtype=int), []), DtypeError, "test_shapes.ids: layers is a list, expected a tuple"),
    (
        lambda: ids(z(3, 2, dtype=int), (Params(z(4, 3)), Params(z(4, 2)))),
        ShapeError,
        "test_shapes.ids: layers[1].w has shape (4, 2), expected (R, C); R = 4 from layers[0].w, C = 3 from",
    ),
    (lambda: ids(z(2, 2, dtype=int)), ShapeError, "ids: result has shape (3,), expected (N,); N = 2 from i"),
    (lambda: gate(z(2, 3)), TypeError, "test_shapes.gate: missing a required argument: 'params'"),
    (lambda: gate(z(2, 3), Params(z(4, 3)), epsilon=1), TypeError, "got an unexpected keyword argument 'epsilon'"),
]


@pytest.mark.parametrize("call", GOOD)
def test_accepted(call):
    call()


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_refused(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_expect_names_the_value():
    expect(True, "conv.forward: stride", 1, "at least 1")
    with pytest.raises(ValueError, match=r"^conv.forward: stride is 0, expected at least 1$"):
        expect(False, "conv.forward: stride", 0, "at least 1")


def test_nothing_is_computed_before_the_check():
    reached = []

    @shaped
    def work(x: Shaped[Array, "N N"]):
        reached.append(x)

    with pytest.raises(ShapeError, match="expected \\(N, N\\)"):
        work(z(2, 3))
    assert not reached


def test_spelled():
    assert spelled(gate) == (
        "gate(x: (N, C, *S), params: test_shapes.Params, *, mask: (N,) bool or None = None, eps=0.1) -> None"
    )
    assert spelled(Params) == "Params(w: (R, C), b: (R,) or None)"
    assert spelled(tied).startswith("tied(x: (N, C), inner: linear.Params with I=C O=R, other: linear.Params or None")
    assert spelled(pair) == "pair(x: (N, R)) -> (test_shapes.Two, ())"


def test_arguments_are_checked_and_completed_without_a_call():
    x, params = z(2, 3), Params(z(4, 3))
    assert gate.arguments(x, params, eps=0.5) == {"x": x, "params": params, "mask": None, "eps": 0.5}
    with pytest.raises(ShapeError, match=r"test_shapes.gate: x has shape \(2,\), expected"):
        gate.arguments(z(2), params)
    with pytest.raises(TypeError, match=r"test_shapes.gate: .*'esp', expected test_shapes.gate\(x, params"):
        gate.arguments(x, params, esp=0.5)
