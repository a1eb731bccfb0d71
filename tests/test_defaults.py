"""Defaults are the official ones, and `init` draws what its docstring says: examples name all, and so show neither."""

import inspect

import numpy as np
import pytest

from refattn.attention.channel import efficient_channel
from refattn.core import leaves
from refattn.registry import everything

OFFICIAL = {  # of forward; where authors' code, paper and ports differ, the authors' code
    "average_pool": {"padding": 0, "count_include_pad": True},
    "batch_norm": {"eps": 1e-5},
    "bilinear_resize": {"align_corners": False},
    "gru_cell": {"reset_after": True, "z_weighs": "old"},
    "matrix_sqrt": {"iterations": 5},
    "maxout": {"pieces": 2},
    "bam_channel": {"pool": "square"},
    "bam_spatial": {"dilation": 4},
    "bam": {"combine": "mul", "pool": "square", "dilation": 4},
    "cbam_channel": {"pools": ("avg", "max")},
    "cbam_spatial": {"maps": ("max", "avg")},
    "cbam": {"pools": ("avg", "max"), "maps": ("max", "avg")},
    "channel_self": {"sign": -1},
    "dual": {"sign": -1},
    "second_order_channel": {"iterations": 5, "crop": 1000},
    "selective_kernel": {"stride": 1, "dilations": (1, 2), "groups": 32, "split_input": False, "eps": 1e-5},
    "split_attention": {"radix": 2, "stride": 1, "padding": 0, "dilation": 1, "eps": 1e-5},
    "simam": {"lam": 1e-4, "unbiased": True},
    "context_feature_extraction": {"dilations": (1, 3, 5, 7), "eps": 1e-3},
    "pyramid_spatial": {"relu": True, "eps": 1e-3},
    "non_local": {"mode": "embedded_gaussian", "pool": "before", "scale": True, "eps": 1e-5},
    "region_non_local": {"grid": 2, "pool": "after"},
    "additive_decoder": {"reset_after": False, "z_weighs": "new"},
    "local_attention": {"gaussian": "weights", "start": 0},
    "luong_decoder": {"feed": True, "gaussian": "weights"},
    "luong_chatbot": {"mask_padding": False},
    "rnn_search": {"gru": "paper"},
    "transformer_encoder_layer": {"norm_first": False, "activation": "relu", "is_causal": False, "eps": 1e-5},
}

SIZES = {  # of init, as published
    "squeeze_excitation": {"reduction": 16, "bias": True},
    "second_order_channel": {"reduction": 16},
    "selective_kernel": {"reduction": 16, "least": 32, "groups": 32},
    "split_attention": {"radix": 2, "reduction": 4, "least": 32, "bias": False},
    "efficient_channel": {"bias": False},
    "bam": {"reduction": 16, "layers": 1, "dilated": 2},
    "cbam": {"reduction": 16, "kernel": 7},
    "cbam_spatial": {"kernel": 7, "norm": True},
    "position": {"reduction": 8},
    "pyramid_feature": {"filters": 32, "width": 64, "kernel": 9},
    "luong_decoder": {"cell": "lstm", "layers": 1, "feed": True, "bias": False},
    "luong_chatbot": {"cell": "gru", "layers": 1},
    "luong_encoder_decoder": {"cell": "lstm", "layers": 1, "feed": True},
}


def defaults(function):
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_of_forward(name):
    assert OFFICIAL[name].items() <= defaults(everything()[name].forward).items()


@pytest.mark.parametrize("name", SIZES)
def test_of_init(name):
    assert SIZES[name].items() <= defaults(everything()[name].init).items()


VARIANCE_ONE_OVER_FAN_IN = {  # sizes, and the weights: path -> inputs of one unit
    "linear": ((400, 300), {"weight": 400}),
    "conv": ((40, 60, (3, 5)), {"weight": 40 * 15}),
    "squeeze_excitation": ((400, 2), {"w1": 400, "w2": 200}),
    "cbam_channel": ((400, 2), {"w1": 400, "w2": 200}),
    "cbam_spatial": ((31,), {"weight": 2 * 31 * 31}),
    "alignment_score": ((300, 200), {"weight": 200}),
    "additive": ((300, 200, 100), {"w.weight": 300, "u.weight": 200, "v": 100}),
}


@pytest.mark.parametrize("name", VARIANCE_ONE_OVER_FAN_IN)
def test_spread_of_initial_weights(name):
    sizes, fan_in = VARIANCE_ONE_OVER_FAN_IN[name]
    drawn = dict(leaves(everything()[name].init(np.random.default_rng(0), *sizes)))
    for path, inputs in fan_in.items():
        spread = drawn[path].std() * inputs**0.5
        assert 0.75 < spread < 1.25, f"{name}: {path} has a standard deviation of {spread:.3g} / sqrt({inputs})"


def test_kernel_of_efficient_channel_attention():
    """log2(C) / 2 + 1 / 2, cut to a whole number, and the next odd one if that is even."""
    channels = (16, 64, 128, 256, 512, 1024, 2048)
    assert [efficient_channel.adaptive_kernel(c) for c in channels] == [3, 3, 5, 5, 5, 5, 7]
    assert efficient_channel.adaptive_kernel(256, gamma=1, b=1) == 9
