"""Defaults are the official ones, and `init` draws what its docstring says: examples name all, and so show neither."""

import inspect

import numpy as np
import pytest

from refattn.attention.channel import efficient_channel
from refattn.attention.spatial import non_local
from refattn.attention.temporal import additive
from refattn.core import leaves
from refattn.primitives import alignment_score, layer_norm, rms_norm
from refattn.registry import everything

OFFICIAL = {  # of forward; where authors' code, paper and ports differ, the authors' code
    "adaptive_average_pool": {"size": 1},
    "adaptive_max_pool": {"size": 1},
    "alignment_score": {"score": "general"},
    "average_pool": {"stride": None, "padding": 0, "count_include_pad": True},
    "batch_norm": {"eps": 1e-5},
    "bilinear_resize": {"align_corners": False},
    "conv": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "conv_norm_relu": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "eps": 1e-5},
    "feed_forward": {"activation": "relu"},
    "group_norm": {"eps": 1e-5},
    "gru_cell": {"reset_after": True, "z_weighs": "old"},
    "layer_norm": {"axes": 1, "eps": 1e-5},
    "log_softmax": {"axis": -1},
    "logsumexp": {"axis": -1, "keepdims": False},
    "max_pool": {"stride": None, "padding": 0, "dilation": 1},
    "recurrent": {"direction": "forward", "padded": "zero", "reset_after": True, "z_weighs": "old"},
    "recurrent_cell": {"reset_after": True, "z_weighs": "old"},
    "rms_norm": {"eps": 1e-6},
    "softmax": {"axis": -1},
    "softmax_plus_one": {"axis": -1},
    "top_k_softmax": {"axis": -1, "ties": "first"},
    "gumbel_softmax": {"temperature": 1.0, "axis": -1, "noise": None},
    "sparsemax": {"axis": -1},
    "entmax": {"axis": -1},
    "matrix_power_pool": {"iterations": 5},
    "efficient_channel": {"circular": False},
    "pyramid_feature": {"relu": True, "eps": 1e-3},
    "hybrid": {
        "channel": "squeeze_excitation",
        "spatial": "cbam_spatial",
        "self_attention": "position",
        "arrangement": "sequence",
        "order": ("channel", "spatial", "self_attention"),
    },
    "attention_wrapper": {"output": "attention", "score": "general"},
    "multiplicative": {"score": "general"},
    "luong_encoder_decoder": {"score": "general", "feed": True, "gaussian": "weights"},
    "grouped_query": {"order": "repeat_interleave", "is_causal": False},
    "grouped_query_layer": {"is_causal": False},
    "latent": {"form": "expanded", "pairing": "interleaved", "is_causal": True, "eps": 1e-6},
    "talking_heads": {"is_causal": False},
    "differential": {"is_causal": False, "eps": 1e-5},
    "qk_norm": {
        "norm": "rms",
        "order": "norm_first",
        "pairing": "interleaved",
        "is_causal": False,
        "eps": 1e-6,
    },
    "gated": {"is_causal": False},
    "latent_pool": {"activation": "gelu_tanh", "eps": 1e-6},
    "set_attention": {"eps": 1e-5},
    "multi_head": {"is_causal": False, "add_zero_attn": False},
    "streaming": {"dropout_p": 0.0, "return_lse": False},
    "dot_product_attention": {"is_causal": None, "q_offset": None, "dropout_p": 0.0, "return_lse": False},
    "cached": {"is_causal": True},
    "paged": {"is_causal": False, "q_offset": "bottom_right", "return_lse": False},
    "packed": {"is_causal": False, "q_offset": "bottom_right", "return_lse": False},
    "scaled_dot_product": {"scale": None, "is_causal": False},
    "normalised_attention": {"normaliser": "softmax", "options": None, "scale": None, "is_causal": False},
    "sigmoid_attention": {"bias": None, "scale": None, "is_causal": False},
    "transformer_decoder_layer": {"norm_first": False, "activation": "relu", "is_causal": True, "eps": 1e-5},
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
    "local_attention": {"score": "general", "gaussian": "weights", "start": 0},
    "luong_decoder": {"score": "general", "feed": True, "gaussian": "weights"},
    "luong_chatbot": {"score": "general", "mask_padding": False},
    "rnn_search": {"gru": "paper"},
    "transformer_encoder_layer": {"norm_first": False, "activation": "relu", "is_causal": False, "eps": 1e-5},
    "rotary": {"pairing": "interleaved"},
    "alibi": {"offset": 0, "form": "distance"},
    "axial_rotary": {"pairing": "interleaved"},
    "decomposed_2d": {"prefix": 0, "scale_bias": False},
    "shaw": {"is_causal": False, "offset": 0},
    "sinusoidal": {"scale": 1.0, "base": 1e4, "layout": "interleaved", "frequencies": "exclusive"},
    "xpos": {"base": 1e4, "scale_base": 512.0, "pairing": "interleaved"},
    "t5_bias": {"offset": 0, "bidirectional": True, "max_distance": 128},
}

SIZES = {  # of init, as published
    "alignment_score": {"score": "general", "bias": False, "scale": False},
    "conv": {"groups": 1, "bias": True},
    "conv_norm_relu": {"groups": 1, "bias": False},
    "feed_forward": {"bias": True},
    "gru_cell": {"bias": True},
    "layer_norm": {"bias": True},
    "linear": {"bias": True},
    "lstm_cell": {"bias": True},
    "recurrent": {"cell": "gru", "layers": 1, "direction": "forward", "bias": True},
    "rnn_cell": {"bias": True},
    "squeeze_excitation": {"reduction": 16, "bias": True},
    "second_order_channel": {"reduction": 16, "bias": True},
    "selective_kernel": {"kernels": (3, 3), "groups": 32, "reduction": 16, "least": 32, "split_input": False},
    "split_attention": {"kernel": 3, "radix": 2, "groups": 1, "reduction": 4, "least": 32, "norm": True, "bias": False},
    "efficient_channel": {"shared": True, "bias": False},
    "bam": {"reduction": 16, "layers": 1, "dilated": 2},
    "bam_channel": {"reduction": 16, "layers": 1},
    "bam_spatial": {"reduction": 16, "dilated": 2},
    "cbam": {"reduction": 16, "kernel": 7, "spatial": True},
    "cbam_channel": {"reduction": 16, "bias": True},
    "cbam_spatial": {"kernel": 7, "norm": True},
    "hybrid": {"channel": "squeeze_excitation", "spatial": "cbam_spatial", "self_attention": "position"},
    "context_feature_extraction": {"filters": 32, "kernels": (1, 3, 3, 3)},
    "non_local": {"inner": None, "mode": "embedded_gaussian", "bias": True, "norm": True},
    "position": {"reduction": 8},
    "pyramid_feature": {"filters": 32, "width": 64, "kernel": 9},
    "pyramid_spatial": {"kernel": 9},
    "additive": {"bias": False, "normalize": False},
    "additive_decoder": {"bias": False},
    "attention_wrapper": {"cell": "gru", "layers": 1},
    "luong_decoder": {"cell": "lstm", "layers": 1, "feed": True, "bias": False},
    "luong_chatbot": {"score": "general", "cell": "gru", "layers": 1},
    "luong_encoder_decoder": {"cell": "lstm", "layers": 1, "feed": True},
    "multiplicative": {"score": "general", "bias": False, "scale": False},
    "grouped_query_layer": {"bias": False},
    "latent": {"q_rank": 1536, "kv_rank": 512, "nope": 128, "rope": 64, "value": 128},
    "talking_heads": {"bias": False},
    "qk_norm": {"beta": False},
    "gated": {"bias": True},
    "latent_pool": {"latents": 1},
    "set_attention": {"norm": False},
    "multi_head": {"bias": True, "bias_kv": False},
    "rnn_search": {"directions": 2},
    "shaw": {"clip": 16, "values": True},
    "swin_v2": {"hidden": 512},
    "transformer_decoder_layer": {"bias": True},
    "transformer_encoder_layer": {"bias": True},
}


def defaults(function):
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_of_forward(name):
    assert OFFICIAL[name].items() <= defaults(everything()[name].forward).items()


@pytest.mark.parametrize("name", SIZES)
def test_of_init(name):
    assert SIZES[name].items() <= defaults(everything()[name].init).items()


@pytest.mark.parametrize("table, part", [(OFFICIAL, "forward"), (SIZES, "init")], ids=["forward", "init"])
def test_no_default_is_left_out(table, part):
    for m in everything().values():
        known = defaults(getattr(m, part)) if hasattr(m.module, part) else {}
        decided = {name for name, value in known.items() if value not in (inspect.Parameter.empty, None)}
        silent = decided - set(table.get(m.name, {}))
        assert not silent, f"{m}.{part}: the defaults of {silent} are not in the table"


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


def test_vectors_that_scores_are_summed_with_start_at_one_over_their_length():
    rng = np.random.default_rng(0)
    assert additive.init(rng, 3, 2, 25, normalize=True).g == 1 / 5
    spread = alignment_score.init(rng, 2, 3, score="concat", hidden=400).v.std() * 20
    assert 0.75 < spread < 1.25


PARAMETERS = {  # how many numbers the published modules of 64 channels hold
    "bam_channel": 64 * 4 + 4 + 2 * 4 + 4 * 64 + 64,
    "bam_spatial": 64 * 4 + 4 + 2 * 4 + 2 * (4 * 4 * 9 + 4 + 2 * 4) + 4 + 1,
    "cbam": 64 * 4 + 4 + 4 * 64 + 64 + 2 * 49 + 2,
    "squeeze_excitation": 64 * 4 + 4 + 4 * 64 + 64,
    "position": 2 * (64 * 8 + 8) + 64 * 64 + 64 + 1,
    "non_local": 3 * (64 * 32 + 32) + 32 * 64 + 64 + 2 * 64,
    "efficient_channel": 3,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    drawn = everything()[name].init(np.random.default_rng(0), 64)
    assert sum(x.size for _, x in leaves(drawn)) == PARAMETERS[name]


def test_kernel_of_efficient_channel_attention():
    """log2(C) / 2 + 1 / 2, cut to a whole number, and the next odd one if that is even."""
    channels = (16, 64, 128, 256, 512, 1024, 2048)
    assert [efficient_channel.adaptive_kernel(c) for c in channels] == [3, 3, 5, 5, 5, 5, 7]
    assert efficient_channel.adaptive_kernel(256, gamma=1, b=1) == 9


def test_a_non_local_block_embeds_into_half_the_channels():
    sizes = [non_local.init(np.random.default_rng(0), c).theta.weight.shape for c in (1, 5, 8)]
    assert sizes == [(1, 1), (2, 5), (4, 8)]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=["layer_norm", "rms_norm"])
def test_a_norm_without_eps(norm):
    """eps = 0 is allowed as long as nothing is divided by 0."""
    x = np.array([[1.0, -3.0, 2.0]])
    y, _ = norm.forward(x, eps=0.0)
    assert abs((y * y).mean() - 1) < 1e-15
    with pytest.raises(ValueError, match=r"eps is 0\.0, expected more than 0"):
        norm.forward(np.concatenate([x, 0 * x]), eps=0.0)
