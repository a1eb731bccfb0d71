"""How good the judge is where no bound is known in closed form: planted bugs are seen, right code is not accused.

A candidate is the source of a mechanism, without its checks, with one line changed, or none.
"""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from refattn.attention.channel import cbam_channel, second_order_channel, squeeze_excitation
from refattn.attention.dot_product import multi_head, scaled_dot_product
from refattn.attention.mixed import cbam
from refattn.attention.spatial import cbam_spatial
from refattn.attention.temporal import additive, additive_decoder
from refattn.oracle.check import check
from refattn.primitives import covariance_pool, gru_cell, matrix_sqrt, softmax

KINDS = {  # the mechanism, and the files that are its own for the purpose
    "squeeze_excitation": (squeeze_excitation,),
    "cbam": (cbam, cbam_channel, cbam_spatial),
    "second_order_channel": (second_order_channel, covariance_pool, matrix_sqrt),
    "additive_decoder": (additive_decoder, additive, gru_cell),
    "multi_head": (multi_head, scaled_dot_product, softmax),
}
MUTANTS = [  # mechanism, file, what stands there, and what stands there instead
    ("squeeze_excitation", squeeze_excitation, "x.mean(axis=(2, 3))", "x.sum(axis=(2, 3))"),
    ("squeeze_excitation", squeeze_excitation, "x.mean(axis=(2, 3))", "x.max(axis=(2, 3))"),
    ("squeeze_excitation", squeeze_excitation, "sigmoid(h @ w2.T", "np.tanh(h @ w2.T"),
    ("squeeze_excitation", squeeze_excitation, "gate = sigmoid(h", "gate = 1.0001 * sigmoid(h"),
    ("squeeze_excitation", squeeze_excitation, "(1 - gate)", "(1 - gate * gate)"),
    ("squeeze_excitation", squeeze_excitation, "(h.real > 0)", "(h.real >= 0)"),
    ("squeeze_excitation", squeeze_excitation, "(x.shape[2] * x.shape[3])", "x.shape[2]"),
    ("squeeze_excitation", squeeze_excitation, "da.sum(axis=0)", "da.mean(axis=0)"),
    ("squeeze_excitation", squeeze_excitation, "du.T @ h", "du[:1].T @ h[:1]"),
    ("cbam", cbam_channel, "h = relu(z @ w1.T if b1 is None else z @ w1.T + b1)", "h = relu(z @ w1.T)"),
    ("cbam", cbam_channel, ".sum(axis=0)\n    gate", ".mean(axis=0)\n    gate"),
    ("cbam", cbam_channel, "z = np.stack([_pool(kind, _flat(x)) for kind in pools])",
     "z = np.stack([_pool('avg', _flat(x)) for kind in pools])"),
    ("cbam", cbam_channel, "len(pools) * de.sum", "de.sum"),
    ("cbam", cbam_channel, "return dz / x.shape[2]", "return dz / (x.shape[2] + 1)"),
    ("cbam", cbam_channel, "x.real.argmax(axis=2)", "abs(x).argmax(axis=2)"),
    ("cbam", cbam_spatial, "x.mean(axis=1, keepdims=True)", "x.sum(axis=1, keepdims=True)"),
    ("cbam", cbam_spatial, "for kind in maps]", "for kind in maps[::-1]]"),
    ("cbam", cbam_spatial, "dx += davg / x.shape[1]", "dx += davg"),
    ("cbam", cbam_spatial, "return x * gate, Saved", "return x * gate * 0.9999, Saved"),
    ("cbam", cbam_spatial, "winner, axis=1) + dmax", "winner, axis=1)"),
    ("cbam", cbam, "dy, dspatial = cbam_spatial", "_, dspatial = cbam_spatial"),
    ("second_order_channel", second_order_channel, "r.mean(axis=1)", "r.sum(axis=1)"),
    ("second_order_channel", second_order_channel, "r.mean(axis=1)", "r.diagonal(axis1=1, axis2=2)"),
    ("second_order_channel", second_order_channel, "iterations=iterations)", "iterations=iterations + 1)"),
    ("second_order_channel", second_order_channel, "dv[:, None, :] / dv.shape[1]", "dv[:, None, :]"),
    ("second_order_channel", second_order_channel, "dx[:, :, rows, columns] +=", "dx[:, :, rows, columns] ="),
    ("second_order_channel", covariance_pool, "swapaxes(1, 2) / pixels", "swapaxes(1, 2) / (pixels - 1)"),
    ("second_order_channel", covariance_pool, "(ds + ds.swapaxes(1, 2))", "(2 * ds)"),
    ("second_order_channel", matrix_sqrt, "np.sqrt(trace) * y, Saved", "trace * y, Saved"),
    ("second_order_channel", matrix_sqrt, "(dy / trace + dtrace * np", "(dy / trace + 0 * dtrace * np"),
    ("second_order_channel", matrix_sqrt, "dt = y @ dy + dz @ z", "dt = y @ dy + z @ dz"),
    ("additive_decoder", gru_cell, "(r * p if reset_after else p)", "(p if reset_after else r * p)"),
    ("additive_decoder", gru_cell, "keep = z if z_weighs == \"old\" else 1 - z\n    return", "keep = z\n    return"),
    ("additive_decoder", gru_cell, "np.tanh(a_n", "1.001 * np.tanh(a_n"),
    ("additive_decoder", gru_cell, "dr * r * (1 - r)", "dr * r"),
    ("additive_decoder", gru_cell, "(1 - n * n)", "(1 - n)"),
    ("additive_decoder", gru_cell, "dh = dnew * keep", "dh = dnew"),
    ("additive_decoder", gru_cell, "dp.T @ s]", "dp.T @ h]"),
    ("additive_decoder", additive_decoder, "dstate = dbefore + dquery[:, 0]", "dstate = dbefore"),
    ("additive_decoder", additive_decoder, "dmemory = dmemory + dattended", "dmemory = dattended"),
    ("additive_decoder", additive_decoder, "states.append(state)", "states.append(new)"),
    ("multi_head", multi_head, "(b, t, heads, features // heads).swapaxes(1, 2)",
     "(b, t, features // heads, heads).swapaxes(1, 3).swapaxes(2, 3)"),
    ("multi_head", multi_head, "of_own_keys &= mask", "of_own_keys |= mask"),
    ("multi_head", multi_head, "of_own_keys &= np.tri(q.shape[1], k.shape[1], dtype=bool)",
     "of_own_keys &= np.tri(q.shape[1], k.shape[1], -1, dtype=bool)"),
    ("multi_head", multi_head, "if add_zero_attn:", "if False:"),
    ("multi_head", multi_head, "dk[:, own].sum(axis=0)", "dk[0, own]"),
    ("multi_head", scaled_dot_product, "1 / math.sqrt(q.shape[-1])", "1 / math.sqrt(q.shape[-1] + 0.01)"),
    ("multi_head", scaled_dot_product, "1 / math.sqrt(q.shape[-1])", "1 / q.shape[-1]"),
    ("multi_head", scaled_dot_product, "return scale * (dscores @ k)", "return (dscores @ k)"),
    ("multi_head", scaled_dot_product, "@ q), dv", "@ q), 0.999 * dv"),
    ("multi_head", softmax, "(dp * p).sum(axis=axis, keepdims=True)", "0"),
]  # fmt: skip


def copy_of(module, change=None):
    """The module again, without its checks, with a change (old, new) in its source."""
    source = Path(module.__file__).read_text(encoding="utf-8").replace("@shaped\n", "")
    if change is not None:
        assert change[0] in source, f"{module.__name__} has no {change[0]!r}"
        source = source.replace(*change, 1)
    copy = ModuleType(f"copy_of_{module.__name__}")
    sys.modules[copy.__name__] = copy  # NamedTuples look their module up
    exec(compile(source, module.__file__, "exec"), copy.__dict__)
    return copy


def candidate(kind, file=None, change=None):
    """(forward, backward) of copies that see each other."""
    copies = {m: copy_of(m, change if m is file else None) for m in KINDS[kind]}
    for copy in copies.values():
        for module, other in copies.items():
            name = module.__name__.rpartition(".")[2]
            if name in vars(copy):
                setattr(copy, name, other)
    own = copies[KINDS[kind][0]]

    def forward(*args, **options):
        return own.forward(*args, **options)[0]

    def backward(dout, *args, **options):
        given = args[: own.forward.__code__.co_argcount]
        out, saved = own.forward(*given, **options)
        if isinstance(out, tuple):
            dout = type(out)(*dout)
        return own.backward(dout, saved)

    return forward, backward


@pytest.mark.parametrize("arithmetic", ["float32", "f16_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_right_code_is_not_accused(kind, arithmetic):
    forward, backward = candidate(kind)
    for seed in range(3):
        report = check(forward, kind, backward=backward, arithmetic=arithmetic, max_examples=16, seed=seed)
        assert report.ok and report.gradients == "judged", str(report)


def found(kind, file, old, new):
    forward, backward = candidate(kind, file, (old, new))
    with np.errstate(all="ignore"):
        return not check(forward, kind, backward=backward, max_examples=8, seed=5).ok


@pytest.mark.parametrize("kind", KINDS)
def test_planted_bugs_are_seen(kind):
    tried = [mutant for mutant in MUTANTS if mutant[0] == kind]
    missed = [f"{old} -> {new}" for _, file, old, new in tried if not found(kind, file, old, new)]
    assert len(missed) <= 0.1 * len(tried), missed
