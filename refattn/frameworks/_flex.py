"""What torch makes programs of: FlexAttention, and torch.compile of scaled_dot_product_attention.

Every shape and every combination of options is compiled anew, which takes seconds: what is compiled here has one of
each. On the CPU, FlexAttention has no gradients.
"""

import functools
import shutil
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as api
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from refattn.core import Call
from refattn.oracle.contract import Departure, NotHandled

SHAPE = 2, 2, 24, 48, 16  # items, heads, queries, keys, features


def _quiet(function):
    """Without what torch says of its own use of TorchScript, and of FlexAttention without a compiler."""

    @functools.wraps(function)
    def quiet(*args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return function(*args, **options)

    return quiet


def flex(
    q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None, window=None, softcap=None, return_lse=False
):
    """The options as a score_mod and a mask_mod, in torch's own order of things, without a compiler."""
    return _flex(flex_attention, q, k, v, attn_bias, attn_mask, is_causal, scale, window, softcap, return_lse)


@_quiet
def _flex(function, q, k, v, attn_bias, attn_mask, is_causal, scale, window, softcap, return_lse):
    (b, heads, queries), keys = q.shape[:3], k.shape[2]
    everywhere = b, heads, queries, keys
    bias = None if attn_bias is None else attn_bias.expand(everywhere)
    mask = None if attn_mask is None else attn_mask.expand(everywhere)
    left, right = window or (None, None)

    def score_mod(score, item, head, i, j):
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[item, head, i, j]

    def mask_mod(item, head, i, j):
        allowed = i >= j if is_causal else i >= 0
        if mask is not None:
            allowed = allowed & mask[item, head, i, j]
        if left is not None:
            allowed = allowed & (j >= i - left)
        return allowed if right is None else allowed & (j <= i + right)

    masked = is_causal or mask is not None or window is not None
    blocks = create_block_mask(mask_mod, *everywhere, device="cpu") if masked else None
    asked = {}
    if return_lse:  # by its name of today, or as older versions have it
        asked = {"return_aux": api.AuxRequest(lse=True)} if hasattr(api, "AuxRequest") else {"return_lse": True}
    out = function(q, k, v, score_mod, blocks, scale, enable_gqa=q.shape[1] != k.shape[1], **asked)
    return (out[0], getattr(out[1], "lse", out[1])) if return_lse else out


@_quiet
def compiled_flex(q, k, v, attn_bias, *, attn_mask):
    if k.shape[2] % 16:
        words = "keys not in sixteens: torch 2.13's compiled FlexAttention reads what was in memory"
        raise Departure("torch-flex-compiled-keys", words)
    _refuse_other_shapes(q, k, v)
    return _flex(_compiled(flex_attention), q, k, v, attn_bias, attn_mask, False, None, None, None, False)


@_quiet
def compiled(q, k, v, *, mask):
    _refuse_other_shapes(q, k, v)
    return _compiled(_attend)(q.contiguous(), k.contiguous(), v.contiguous(), mask.contiguous())


def _attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def lacks_compiler():
    return "" if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler"


def _refuse_other_shapes(q, k, v):
    b, heads, queries, keys, features = SHAPE
    if q.shape != (b, heads, queries, features) or k.shape != v.shape or k.shape != (b, heads, keys, features):
        raise NotHandled("another shape: each is compiled")


def flex_example(draw):
    """At times of a length that is known to go wrong."""
    b, heads, queries, keys, _ = SHAPE
    keys = draw.choice("keys", keys, keys, keys - 8)
    return Call((*_arrays(draw, keys), draw.array(heads, queries, keys)), {"attn_mask": draw.mask(b, 1, queries, keys)})


def compiled_example(draw):
    b, heads, queries, keys, _ = SHAPE
    return Call(_arrays(draw, keys), {"mask": draw.mask(b, heads, queries, keys)})


def _arrays(draw, keys):
    b, heads, queries, _, features = SHAPE
    return tuple(draw.array(b, heads, length, features) for length in (queries, keys, keys))
