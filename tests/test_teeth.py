"""Plant a fault in every gradient of every mechanism: the gradient law must notice.

A law that cannot fail proves nothing. A fault that no law notices is either a gap in the laws or a
gradient that is always zero, and both deserve a comment in the mechanism's file.
"""

import numpy as np
import pytest

from refattn.core import leaves, tree_map
from refattn.draw import RandomDraw
from refattn.oracle.derivatives import complex_step, largest
from refattn.oracle.laws import generic, gradient_matches_complex_step, only
from refattn.registry import everything

FAULTS = {
    "dropped": lambda g: np.zeros_like(g),
    "sign": lambda g: -g,
    "factor 2": lambda g: 2 * g,
    "1% off": lambda g: 1.01 * g,
    "averaged over the batch": lambda g: g / 3,
    "one element lost": lambda g: g * (np.arange(g.size).reshape(g.shape) != g.size // 2),
}

ALWAYS_ZERO = {  # gradients that no factor can spoil: what must be noticed is something made of nothing
    ("transformer_encoder_layer", "1.attention.k.bias"): "it adds the same to all scores, which softmax does not see",
    ("transformer_decoder_layer", "2.attention.k.bias"): "as in transformer_encoder_layer",
    ("transformer_decoder_layer", "2.cross_attention.k.bias"): "as in transformer_encoder_layer",
    ("grouped_query_layer", "3.k.bias"): "as in transformer_encoder_layer",
    ("talking_heads", "3.pre.bias"): "it adds the same to all scores of a query, which softmax does not see",
    ("class_attention", "1.k.bias"): "as in transformer_encoder_layer",
    ("attention_pool", "1.attention.k.bias"): "as in transformer_encoder_layer",
    ("latent_pool", "1.attention.k.bias"): "as in transformer_encoder_layer",
    ("set_attention", "2.k.bias"): "as in transformer_encoder_layer",
    ("additive", "2.b"): "it adds the same to all scores, which softmax does not see",
    ("additive_decoder", "3.attention.b"): "as in additive",
    ("position", "1.key.bias"): "as in transformer_encoder_layer",
    ("region_non_local", "1.phi.bias"): "as in transformer_encoder_layer",
}


class Faulty:
    """A mechanism whose gradient of one argument is wrong in one way."""

    def __init__(self, mechanism, path, fault):
        self._mechanism, self._path, self._fault = mechanism, path, fault

    def __getattr__(self, name):
        return getattr(self._mechanism, name)

    def __str__(self):
        return f"faulty {self._mechanism}"

    def backward(self, dout, saved):
        grads = tuple(self._mechanism.backward(dout, saved))
        broken = iter([p == self._path for p, _ in leaves(grads)])
        return tree_map(lambda g: self._fault(g) if next(broken) else g, grads)


SEEDS = range(10)


def cases():
    for m in everything().values():
        paths = {path: None for seed in SEEDS for path, _ in leaves(m.example(RandomDraw(seed)).args)}
        for path in paths:
            faults = {"not nothing": lambda g: g + 1} if (str(m), path) in ALWAYS_ZERO else FAULTS
            for name, fault in faults.items():
                yield pytest.param(Faulty(m, path, fault), id=f"{m}-{path}-{name}")


@pytest.mark.parametrize("faulty", list(cases()))
def test_the_gradient_law_notices(faulty):
    def noticed(seed):
        try:
            gradient_matches_complex_step(faulty, faulty.example(RandomDraw(seed)), np.random.default_rng(seed))
        except AssertionError:
            return True
        return False

    assert any(noticed(seed) for seed in SEEDS), f"{faulty}: this fault goes unnoticed"


@pytest.mark.parametrize("name, path", ALWAYS_ZERO)
@pytest.mark.parametrize("seed", SEEDS)
def test_always_zero(name, path, seed):
    """The complex step agrees that this gradient leaves nothing for a factor to spoil."""
    args, options = everything()[name].example(RandomDraw(seed))
    along = only(generic(np.random.default_rng(seed), args), path)
    jv = complex_step(lambda *moved: everything()[name].forward(*moved, **options)[0], args, along)
    assert largest(jv) <= 1e-13, f"{name}: the gradient of {path} is not zero"
