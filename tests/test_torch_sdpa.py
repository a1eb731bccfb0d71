"""The preset torch_sdpa and torch's own function, over every combination of its options: forward and gradients."""

import itertools
import math

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention
from refattn.oracle.conventions import PRESETS
from tests.test_conventions import same

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")

LEAD = (), (3,), (2, 4), (2, 1, 2)  # what stands before (length, features)
LENGTHS = (3, 5), (4, 4), (5, 3), (1, 1), (2, 0), (0, 2)
SCALES = None, 0.3, -0.5, 0.0
MASKS = {"none": (None,), "bool": ("full", "rows", "keys"), "float": ("full", "rows", "keys", "one")}


@pytest.fixture(autouse=True)
def math_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
    torch.set_num_threads(threads)


def four(x):
    """With two axes before (length, features)."""
    return x.reshape(math.prod(x.shape[:-3]), *((1, 1, *x.shape)[-3:]))


def mask_shape(kind, lead, lengths):
    """Stretched along nothing, along all but (length, length), along queries too, along everything."""
    return {"full": (*lead, *lengths), "rows": lengths, "keys": (1, lengths[1]), "one": (1, 1)}[kind]


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", MASKS)
def test_the_grid(kind, is_causal):
    rng = np.random.default_rng(0)
    grid = itertools.product(LEAD, LENGTHS, SCALES, (3, 2), (False, True), MASKS[kind])
    for lead, lengths, scale, features, gqa, stretched in grid:
        if gqa and lead != (2, 4):
            continue  # heads are the axis before the length
        shared = ((2, 2), (2, 1)) if gqa else (lead, lead)  # fewer heads of k, and fewer still of v
        q = rng.normal(size=(*lead, lengths[0], 3))
        k, v = (rng.normal(size=(*s, lengths[1], d)) for s, d in zip(shared, (3, features)))
        mask = None
        if stretched:
            allowed = rng.random(mask_shape(stretched, lead, lengths)) < 0.6  # rows without any True occur
            mask = allowed if kind == "bool" else np.where(allowed, rng.normal(size=allowed.shape), -np.inf)
        compare(q, k, v, mask, is_causal, scale, gqa, rng)


def compare(q, k, v, mask, is_causal, scale, gqa, rng):
    bias = mask if mask is not None and mask.dtype != bool else None
    inputs = [torch.from_numpy(x).requires_grad_() for x in (q, k, v, bias) if x is not None]
    given = inputs[3] if bias is not None else None if mask is None else torch.from_numpy(mask)
    options = {"is_causal": is_causal, "scale": scale}
    theirs = options | {"enable_gqa": gqa}
    if is_causal and given is not None:  # both at once it refuses: we take both to hold
        lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        given = torch.where(lower, given, False if bias is None else -torch.inf)
        theirs["is_causal"] = False
    y = torch.nn.functional.scaled_dot_product_attention(*inputs[:3], given, **theirs)
    dy = rng.normal(size=tuple(y.shape))
    expected = torch.autograd.grad(y, inputs, torch.from_numpy(dy), allow_unused=True)

    mask = mask if mask is None or mask.ndim == 2 else four(mask)
    args, allowed = (
        ((four(q), four(k), four(v), mask), None) if bias is not None else ((four(q), four(k), four(v)), mask)
    )
    found, saved = dot_product_attention.forward(*args, attn_mask=allowed, convention=PRESETS["torch_sdpa"], **options)
    same(found.reshape(dy.shape), y.detach().numpy(), 1e-12)
    for x, ours, gradient in zip(inputs, dot_product_attention.backward(four(dy), saved), expected):
        same(ours.reshape(x.shape), np.zeros(x.shape) if gradient is None else gradient.numpy(), 1e-12)
