"""Bad options and sizes, as data: each is refused in words that name it, and every check in the package is reached.

A row changes a good call: options are replaced, or a function returns the changed call, or None where the drawn call
does not suit (then the next is tried).
"""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import refattn
from refattn.attention.dot_product import alibi, axial_rotary, packed, rotary, streaming
from refattn.attention.dot_product.dot_product_attention import Convention
from refattn.core import Call, tree_map
from refattn.draw import RandomDraw
from refattn.primitives import conv, embedding, layer_norm, lstm_cell, rnn_cell
from refattn.registry import everything

ROOT = Path(refattn.__file__).parent
SEEDS = range(200)


def args(change, suits=lambda call: True):
    """Replace the arguments of a call by change(*args)."""
    return lambda call: call._replace(args=tuple(change(*call.args))) if suits(call) else None


def first(change, suits=lambda call: True):
    """Replace the first argument by change(argument)."""
    return args(lambda x, *rest: (change(x), *rest), suits)


def params(change, suits=lambda call: True):
    """Replace the parameters, the last argument, by change(params)."""
    return args(lambda *a: (*a[:-1], change(a[-1])), suits)


def options(suits=lambda call: True, **changed):
    return lambda call: Call(call.args, call.options | changed) if suits(call) else None


def given(name, *values):
    """Whether the drawn call has one of these values for an option."""
    return lambda call: call.options.get(name) in values


def no_pixels(x):
    return x[..., :0]


def no_steps(x):
    return x[:, :0]


BAD = [
    ("adaptive_average_pool", first(no_pixels), "x.shape is"),
    ("adaptive_average_pool", options(size=0), "size is 0, expected an int of at least 1"),
    ("adaptive_max_pool", first(no_pixels), "x.shape is"),
    ("adaptive_max_pool", options(size=(1, 2, 3, 4)), "size is (1, 2, 3, 4), expected"),
    ("alignment_score", options(score="cosine"), "score is 'cosine', expected one of"),
    ("alignment_score", params(lambda p: p._replace(weight=None), given("score", "general")), "params given is"),
    (
        "alignment_score",
        args(lambda q, m, p: (q, np.concatenate([m, m], 2), p), given("score", "dot")),
        "memory.shape is",
    ),
    (
        "alignment_score",
        params(lambda p: p._replace(weight=p.weight.repeat(2, axis=1)), given("score", "concat")),
        "params.weight.shape is",
    ),
    ("average_pool", options(stride=0), "stride is 0, expected an int of at least 1, or a tuple of"),
    ("average_pool", options(kernel=99), "kernel is (99"),
    ("average_pool", options(padding=50), "padding is 50, expected less, so that every window sees a pixel of x"),
    ("max_pool", options(padding=50), "padding is 50, expected less, so that every window sees a pixel of x"),
    ("max_pool", options(dilation=1.5), "dilation is 1.5, expected an int of at least 1"),
    ("batch_norm", options(eps=-1.0), "eps is -1.0, expected a number that is not negative"),
    (
        "batch_norm",
        first(lambda x: x[:1, :, :1], lambda c: c.args[0].ndim == 3 and "stats" not in c.options),
        "x.shape",
    ),
    ("bilinear_resize", first(no_pixels), "x.shape is"),
    ("bilinear_resize", options(size=(0, 1)), "size is (0, 1), expected"),
    ("conv", options(stride=0), "stride is 0, expected an int of at least 1"),
    ("conv", options(groups=0), "groups is 0, expected a positive int"),
    ("conv", options(groups=7), "groups is 7, expected a divisor of O ="),
    ("conv", params(lambda p: p._replace(weight=p.weight[..., None])), "params.weight.shape is"),
    ("conv", first(lambda x: np.concatenate([x, x], 1)), "expected I = C / groups ="),
    ("conv", options(reflect=True), "unexpected keyword argument 'reflect'"),
    ("covariance_pool", first(no_pixels), "x.shape is"),
    ("embedding", lambda c: Call(c.args, c.options | {"ids": np.full((2,), len(c.args[0]))}), "ids is"),
    ("embedding", options(ids=np.array([-1])), "ids is [-1], expected ids from 0 to"),
    ("embedding", options(padding_idx=99), "padding_idx is 99, expected None or an id from 0 to"),
    ("feed_forward", options(activation="swish"), "activation is 'swish', expected one of"),
    ("group_norm", options(groups=0), "groups is 0, expected a divisor of C ="),
    ("group_norm", options(groups=7), "groups is 7, expected a divisor of C ="),
    ("gru_cell", options(z_weighs="young"), "z_weighs is 'young', expected 'old' or 'new'"),
    (
        "gru_cell",
        params(lambda p: p._replace(w_x=None), lambda c: c.args[0].shape[1] != 3 * c.args[1].shape[1]),
        "w_x is",
    ),
    ("layer_norm", options(axes=0), "axes is 0, expected from 1 to"),
    ("layer_norm", args(lambda x, p: (x[..., :0], None)), "x.shape is"),
    (
        "layer_norm",
        params(lambda p: tree_map(lambda a: a[..., None].repeat(2, -1), p), lambda c: c.args[1] is not None),
        "params.gamma.shape is",
    ),
    ("layer_norm", options(eps=-1.0), "eps is -1.0, expected more than 0"),
    ("log_softmax", options(axis=3), "axis is 3, expected an axis of an array of shape"),
    ("logsumexp", options(axis=-4), "axis is -4, expected an axis of an array of shape"),
    ("matrix_sqrt", options(iterations=1), "iterations is 1, expected at least 2"),
    ("matrix_sqrt", first(np.zeros_like), "trace of s is"),
    ("maxout", options(pieces=0), "pieces is 0, expected a positive int"),
    ("maxout", options(pieces=97), "pieces is 97, expected a divisor of D ="),
    ("recurrent", options(direction="sideways"), "direction is 'sideways', expected one of"),
    ("recurrent", options(padded="keep"), "padded is 'keep', expected 'zero' or 'hold'"),
    ("recurrent", lambda c: Call((no_steps(c.args[0]), *c.args[1:]), c.options | {"mask": None}), "x.shape is"),
    ("recurrent", params(lambda p: p._replace(cells=())), "len(params.cells) is 0, expected a positive multiple"),
    ("recurrent", params(lambda p: p._replace(cells=(conv.Params(np.zeros((1, 1, 1))),) * 2)), "params.cells is"),
    (
        "recurrent",
        params(
            lambda p: p._replace(cells=(p.cells[0], rnn_cell.init(np.random.default_rng(0), 9, 7))),
            lambda c: isinstance(c.args[2].cells[0], rnn_cell.Params),
        ),
        "w_h.shape is",
    ),
    (
        "recurrent",
        params(
            lambda p: p._replace(cells=(p.cells[0], lstm_cell.init(np.random.default_rng(0), 1, 1))),
            lambda c: isinstance(c.args[2].cells[0], rnn_cell.Params),
        ),
        "params.cells is",
    ),
    ("recurrent", first(lambda x: np.concatenate([x, x], 2)), "w_x.shape is"),
    (
        "recurrent",
        args(lambda x, s, p: (x, tree_map(lambda a: a.repeat(2, 1), s), p), lambda c: c.args[1] is not None),
        "state.h.shape is",
    ),
    ("recurrent_cell", params(lambda p: ()), "params is <class 'tuple'>, expected Params of rnn_cell"),
    (
        "recurrent_cell",
        args(lambda x, s, p: (x, s._replace(c=None), p), lambda c: isinstance(c.args[2], lstm_cell.Params)),
        "state.c is 'NoneType', expected an array for an LSTM",
    ),
    ("rms_norm", args(lambda x, p: (x[..., :0], None)), "x.shape is"),
    ("rms_norm", options(eps=-1.0), "eps is -1.0, expected more than 0"),
    ("softmax", options(axis=3), "axis is 3, expected an axis of an array of shape"),
    ("softmax_plus_one", options(axis=3), "axis is 3, expected an axis of an array of shape"),
    ("top_k_softmax", options(axis=3), "axis is 3, expected an axis of an array of shape"),
    ("gumbel_softmax", options(axis=3), "axis is 3, expected an axis of an array of shape"),
    ("top_k_softmax", options(k=0), "k is 0, expected a positive int"),
    ("top_k_softmax", options(ties="none"), "ties is 'none', expected 'first' or 'all'"),
    ("gumbel_softmax", options(temperature=0.0), "temperature is 0.0, expected a positive number"),
    ("gumbel_softmax", options(temperature=np.inf), "temperature is inf, expected a positive number"),
    ("sparsemax", options(axis=3), "axis is 3, expected an axis of an array of shape"),
    ("entmax", options(axis=3), "axis is 3, expected an axis of an array of shape"),
    # --- channel
    ("bam_channel", options(pool="circle"), "pool is 'circle', expected 'square' or 'global'"),
    (
        "bam_channel",
        lambda c: Call((np.ones((2, c.args[0].shape[1], 4, 9)), c.args[1]), c.options | {"pool": "square"}),
        "expected H <= W < 2 H with pool='square'; or pool='global'",
    ),
    (
        "bam_channel",
        lambda c: options(stats=c.options["stats"]._replace(hidden=()))(c) if c.options.get("stats") else None,
        "stats.hidden is ()",
    ),
    ("channel_self", options(sign=0), "sign is 0, expected -1 or 1"),
    ("cbam_channel", options(pools=()), "pools is (), expected a tuple of one or more of"),
    ("cbam_channel", options(pools=("avg", "median")), "pools is ('avg', 'median'), expected"),
    (
        "efficient_channel",
        params(lambda p: p._replace(weight=np.ones((7, 3)), bias=None)),
        "expected one filter, or one",
    ),
    ("efficient_channel", params(lambda p: p._replace(weight=np.ones((1, 2)), bias=None)), "expected an odd number K"),
    ("second_order_channel", options(crop=0), "crop is 0, expected a positive int, or None"),
    ("second_order_channel", first(np.zeros_like), "expected images that are not constant"),
    ("selective_kernel", params(lambda p: p._replace(branches=p.branches[:1])), "len(params.branches) is 1, expected"),
    ("selective_kernel", options(dilations=(1,)), "dilations is (1,), expected"),
    (
        "selective_kernel",
        lambda c: options(stats=c.options["stats"]._replace(branches=()))(c) if c.options.get("stats") else None,
        "len(stats.branches) is 0",
    ),
    ("selective_kernel", first(lambda x: x[:, :1], given("split_input", True)), "expected a multiple of"),
    (
        "selective_kernel",
        params(lambda p: tree_map(lambda a: a.repeat(2, -1) if a.ndim == 4 else a, p)),
        "and an odd kernel",
    ),
    (
        "selective_kernel",
        params(lambda p: p._replace(select=tree_map(lambda a: a.repeat(2, 0), p.select))),
        "params.select.weight.shape is",
    ),
    ("simam", options(lam=0.0), "lam is 0.0, expected a positive number"),
    ("simam", first(lambda x: x[:, :, :1, :1], given("unbiased", True)), "expected at least two pixels"),
    (
        "split_attention",
        params(lambda p: p._replace(fc2=p.fc2._replace(weight=p.fc2.weight.repeat(5, 1)))),
        "params.fc2.weight.shape is",
    ),
    ("split_attention", options(radix=5), "radix is 5, expected"),
    (
        "split_attention",
        lambda c: options(stats=c.options["stats"]._replace(norm0=None))(c) if c.options["stats"] else None,
        "expected statistics for the normalisations in params, and no others",
    ),
    # --- spatial
    (
        "bam_spatial",
        lambda c: (
            options(stats=c.options["stats"]._replace(dilated=()))(c)
            if c.options.get("stats") and c.args[1].dilated
            else None
        ),
        "stats.dilated is ()",
    ),
    (
        "bam_spatial",
        params(
            lambda p: p._replace(dilated=tree_map(lambda a: a[..., :1] if a.ndim == 4 else a, p.dilated)),
            lambda c: c.args[1].dilated,
        ),
        "expected 3 by 3 only",
    ),
    ("cbam_spatial", options(maps=("max",)), "maps is ('max',), expected ('max', 'avg') or ('avg', 'max')"),
    ("cbam_spatial", params(lambda p: p._replace(weight=np.ones((1, 2, 2, 3)))), "expected odd K and L"),
    (
        "cbam_spatial",
        lambda c: Call((c.args[0], c.args[1]._replace(norm=None)), c.options) if c.options.get("stats") else None,
        "expected None, as params.norm is",
    ),
    ("context_feature_extraction", params(lambda p: p._replace(branches=())), "expected at least one"),
    ("context_feature_extraction", options(dilations=()), "dilations is (), expected"),
    (
        "context_feature_extraction",
        params(lambda p: tree_map(lambda a: a.repeat(2, -1) if a.ndim == 4 else a, p)),
        "expected a kernel with odd sides",
    ),
    (
        "pyramid_spatial",
        params(lambda p: tree_map(lambda a: a.repeat(2, -1) if a.ndim == 4 else a, p)),
        "expected a kernel with odd sides",
    ),
    ("non_local", options(mode="cosine"), "mode is 'cosine', expected one of"),
    ("non_local", options(pool="twice"), "pool is 'twice', expected"),
    ("non_local", params(lambda p: p._replace(theta=None), given("mode", "dot_product")), "params.theta is None"),
    (
        "non_local",
        lambda c: Call((c.args[0], c.args[1]._replace(norm=None)), c.options) if c.options.get("stats") else None,
        "expected None without params.norm",
    ),
    (
        "non_local",
        lambda c: Call((np.ones((*c.args[0].shape[:2], 2, 2, 2, 2)), c.args[1]), c.options | {"pool": "before"}),
        "expected 1 to 3 axes of space",
    ),
    ("non_local", lambda c: Call((c.args[0][..., :1], c.args[1]), c.options | {"pool": "after"}), "space of at least"),
    # --- temporal
    (
        "additive",
        params(lambda p: p._replace(v=0 * p.v), lambda c: c.args[-1].g is not None),
        "expected a direction, not all zeros",
    ),
    (
        "additive_decoder",
        lambda c: Call((no_steps(c.args[0]), *c.args[1:]), c.options | {"target_mask": None}),
        "expected at least one step",
    ),
    ("additive_decoder", options(z_weighs="young"), "z_weighs is 'young', expected 'old' or 'new'"),
    ("attention_wrapper", first(no_steps), "expected at least one step"),
    ("attention_wrapper", options(output="both"), "output is 'both', expected 'attention' or 'cell'"),
    ("attention_wrapper", params(lambda p: p._replace(attention=())), "expected Params of additive or of"),
    ("local_attention", options(window=-1), "window is -1, expected an int of at least"),
    ("local_attention", options(gaussian="both"), "gaussian is 'both', expected 'weights' or 'scores'"),
    ("local_attention", options(start=-1), "start is -1, expected an int of at least 0"),
    (
        "local_attention",
        lambda c: options(lengths=np.full(len(c.args[0]), 99))(c),
        "expected lengths from 0 to S =",
    ),
    ("luong_decoder", first(no_steps), "expected at least one step"),
    ("luong_decoder", params(lambda p: p._replace(attention=())), "expected Params of multiplicative or of"),
    ("luong_decoder", options(given("window", None), window=3), "window is 3, expected None"),
    ("luong_decoder", lambda c: options(lengths=np.full(len(c.args[0]), 99))(c), "expected lengths from 0 to S ="),
    ("rnn_search", options(gru="keras"), "gru is 'keras', expected one of"),
    ("rnn_search", lambda c: options(target=no_steps(c.options["target"]))(c), "expected at least one word"),
    (
        "rnn_search",
        lambda c: options(lengths=np.full(len(c.options["source"]), 99))(c),
        "expected lengths from 0 to",
    ),
    (
        "rnn_search",
        params(lambda p: p._replace(encoder=p.encoder._replace(cells=p.encoder.cells * 3))),
        "expected one or two of gru_cell.Params",
    ),
    (
        "rnn_search",
        params(lambda p: p._replace(read=tree_map(lambda a: a.repeat(2, 0), p.read))),
        "params.read.weight.shape is",
    ),
    (
        "rnn_search",
        params(
            lambda p: p._replace(word=p.word._replace(weight=p.word.weight.repeat(2, 1))),
            lambda c: c.args[-1].deep is None,
        ),
        "params.word.weight.shape is",
    ),
    # --- dot product
    ("grouped_query", options(order="strided"), "order is 'strided', expected one of repeat_interleave, tile"),
    ("grouped_query", args(lambda q, k, v: (q, k[:, :0], v[:, :0])), "expected a divisor of H ="),
    ("grouped_query_layer", options(heads=0), "heads is 0, expected a positive int"),
    ("grouped_query_layer", options(key_heads=0), "key_heads is 0, expected a positive int"),
    ("grouped_query_layer", options(key_heads=97), "key_heads is 97, expected a divisor of heads ="),
    ("grouped_query_layer", options(heads=94, key_heads=1), "heads is 94, expected a divisor of"),
    (
        "grouped_query_layer",
        params(lambda p: p._replace(k=tree_map(lambda a: a.repeat(2, 0), p.k))),
        "params.k.weight.shape is",
    ),
    (
        "grouped_query_layer",
        params(lambda p: p._replace(v=tree_map(lambda a: a[:1], p.v)), given("key_heads", 2)),
        "key_heads is 2, expected a divisor of 1, from params.v.weight",
    ),
    (
        "grouped_query_layer",
        params(lambda p: p._replace(out=p.out._replace(weight=p.out.weight.repeat(2, 1)))),
        "params.out.weight.shape is",
    ),
    (
        "grouped_query_layer",
        lambda c: options(mask=c.options["mask"].repeat(2, 1))(c) if c.options["mask"] is not None else None,
        "mask.shape is",
    ),
    ("latent", options(form="naive"), "form is 'naive', expected 'expanded' or 'absorbed'"),
    ("latent", options(heads=0), "heads is 0, expected a positive int"),
    (
        "latent",
        args(lambda x, cos, sin, p: (x, cos[..., :0], sin[..., :0], p)),
        "2 F is 0, expected at least one angle",
    ),
    ("latent", params(lambda p: p._replace(q_norm=None), lambda c: c.args[3].q_norm is not None), "q_norm is None"),
    ("latent", options(heads=97), "params.q_up.shape is"),
    ("latent", params(lambda p: p._replace(kv_up=p.kv_up[:1])), "params.kv_up.shape is"),
    (
        "latent",
        lambda c: params(lambda p: p._replace(q_up=p.q_up[: c.options["heads"] * 2 * c.args[1].shape[2]]))(c),
        "heads of more than the",
    ),
    (
        "latent",
        lambda c: params(
            lambda p: p._replace(kv_up=p.kv_up[: len(p.q_up) - c.options["heads"] * 2 * c.args[1].shape[2]])
        )(c),
        "at least one of a value",
    ),
    ("latent", params(lambda p: p._replace(kv_down=tree_map(lambda a: a[1:], p.kv_down))), "kv_down.weight.shape is"),
    (
        "latent",
        params(lambda p: p._replace(out=p.out._replace(weight=p.out.weight.repeat(2, 1)))),
        "params.out.weight.shape is",
    ),
    (
        "latent",
        lambda c: options(mask=c.options["mask"].repeat(2, 1))(c) if c.options["mask"] is not None else None,
        "mask.shape is",
    ),
    ("talking_heads", options(scale=np.nan), "scale is nan, expected a finite number, or None"),
    ("talking_heads", args(lambda q, k, v, p: (q[..., :0], k[..., :0], v, p)), "expected at least one feature"),
    ("differential", options(lambda_init=np.inf), "lambda_init is inf, expected a finite number"),
    ("qk_norm", options(norm="batch"), "norm is 'batch', expected one of rms, layer, l2"),
    ("qk_norm", options(order="never"), "order is 'never', expected one of norm_first, rotary_first"),
    (
        "qk_norm",
        lambda c: options(norm="l2")(c) if c.args[3].q is not None and c.args[3].q.beta is not None else None,
        "expected None for norm='l2'",
    ),
    (
        "gated",
        params(lambda p: p._replace(attention=p.attention._replace(out=None))),
        "params.attention.out is None, expected the last projection",
    ),
    (
        "gated",
        params(lambda p: p._replace(gate=tree_map(lambda a: a.repeat(7, 0), p.gate))),
        "params.gate.weight.shape is",
    ),
    ("class_attention", first(no_steps), "x.shape is"),
    ("attention_pool", args(lambda x, p: (no_pixels(x), p._replace(position=None))), "x.shape is"),
    (
        "attention_pool",
        args(lambda x, p: (x.repeat(2, 3), p), lambda c: c.args[1].position is not None),
        "params.position.shape is",
    ),
    ("latent_pool", params(lambda p: p._replace(mlp=None), lambda c: c.args[1].norm is not None), "params.norm is"),
    ("set_attention", options(heads=0), "heads is 0, expected a divisor of D ="),
    ("set_attention", options(heads=97), "heads is 97, expected a divisor of D ="),
    ("multi_head", options(heads=0), "heads is 0, expected a positive int"),
    ("multi_head", options(heads=97), "heads is 97, expected a divisor of"),
    ("multi_head", args(lambda q, *a: (q.repeat(2, 2), *a), lambda c: c.args[3].q is None), "features of q is"),
    (
        "multi_head",
        args(
            lambda q, k, v, p: (q, k, v.repeat(2, 2), p._replace(bias_k=None, bias_v=None)),
            lambda c: c.args[3].v is None and c.args[3].out is not None,
        ),
        "params.out.weight.shape is",
    ),
    ("multi_head", params(lambda p: p._replace(bias_v=None), lambda c: c.args[3].bias_v is not None), "bias_v is None"),
    (
        "multi_head",
        params(
            lambda p: p._replace(bias_k=np.zeros(99)),
            lambda c: c.args[3].q is None and c.args[3].k is None and c.args[3].bias_v is not None,
        ),
        "params.bias_k.shape is (99,), expected",
    ),
    (
        "multi_head",
        lambda c: options(mask=c.options["mask"].repeat(2, 1))(c) if c.options.get("mask") is not None else None,
        "mask.shape is",
    ),
    ("scaled_dot_product", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    ("sigmoid_attention", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    ("normalised_attention", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    ("normalised_attention", args(lambda q, k, v: (q[..., :0], k[..., :0], v)), "expected at least one feature"),
    ("normalised_attention", options(normaliser="sigmoid"), "normaliser is 'sigmoid', expected one of softmax,"),
    ("normalised_attention", options(options={"axis": 0}), "options is {'axis': 0}, expected None, or a dict of"),
    ("normalised_attention", options(normaliser="top_k_softmax", options=None), "missing a required argument: 'k'"),
    ("sigmoid_attention", args(lambda q, k, v, b: (q[..., :0], k[..., :0], v, b)), "expected at least one feature"),
    ("scaled_dot_product", args(lambda q, k, v: (q[..., :0], k[..., :0], v)), "expected at least one feature"),
    ("streaming", options(block=4), "block is 4, expected None or (queries, keys), two positive ints"),
    ("streaming", options(block=(0, 4)), "block is (0, 4), expected None or (queries, keys)"),
    ("streaming", options(jobs=0), "jobs is 0, expected None or a positive int"),
    ("streaming", options(executor=3), "executor is 3, expected None or a concurrent.futures.Executor"),
    ("streaming", options(window=(-1, 0)), "window is (-1, 0), expected None or (left, right)"),
    ("merge_partial", args(lambda y, lse: (y[:0], lse[:0])), "expected at least one part"),
    ("merge_partial", args(lambda y, lse: (y, lse + np.inf), lambda c: np.isfinite(c.args[1]).all()), "lse is inf"),
    ("packed", lambda c: options(cu_seqlens_q=c.options["cu_seqlens_q"] + 1)(c), "cu_seqlens_q is [1"),
    ("packed", lambda c: options(cu_seqlens_k=np.append(c.options["cu_seqlens_k"][:-1], 99))(c), "99], expected"),
    ("packed", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    ("cached", lambda c: options(cache_seqlens=np.full(len(c.args[0]), 99))(c), "cache_seqlens is [99"),
    ("cached", lambda c: options(cache_seqlens=np.full(len(c.args[0]), -1))(c), "cache_seqlens is [-1"),
    ("paged", lambda c: options(kv_seqlens=np.full(len(c.args[0]), 99))(c), "kv_seqlens is [99"),
    ("paged", lambda c: options(kv_seqlens=np.full(len(c.args[0]), -1))(c), "kv_seqlens is [-1"),
    (
        "paged",
        lambda c: options(block_table=0 * c.options["block_table"] - 1)(c) if c.options["kv_seqlens"].any() else None,
        "expected pages from 0 to",
    ),
    (
        "paged",
        lambda c: options(block_table=c.options["block_table"] + 99)(c) if c.options["kv_seqlens"].any() else None,
        "expected pages from 0 to",
    ),
    ("dot_product_attention", options(return_scores="logits"), "return_scores is 'logits', expected None or one of"),
    ("dot_product_attention", options(convention="torch"), "convention is a str, expected dot_product_attention.Conv"),
    (
        "dot_product_attention",
        options(convention=Convention(mask_op="multiply")),
        "convention.mask_op is 'multiply', expected one of replace, add",
    ),
    (
        "dot_product_attention",
        options(convention=Convention(fully_masked="mean")),
        "convention.fully_masked is 'mean', expected one of zero, nan, zero_masked_only, zero_probs",
    ),
    (
        "dot_product_attention",
        options(convention=Convention(mask_value="smallest")),
        "convention.mask_value is 'smallest', expected a number, or 'lowest'",
    ),
    (
        "dot_product_attention",
        options(convention=Convention(softmax_precision="float23")),
        "convention.softmax_precision is 'float23', expected a floating-point dtype, or None",
    ),
    (
        "dot_product_attention",
        options(convention=Convention(softmax_precision=int)),
        "convention.softmax_precision is <class 'int'>, expected a floating-point dtype",
    ),
    (
        "dot_product_attention",
        args(lambda q, k, v, *rest: (q, k[:, :1].repeat(9, 1), v, *rest)),
        "k.shape is",
    ),
    ("dot_product_attention", args(lambda q, k, v, *rest: (q, k, v[:, :0], *rest)), "expected a divisor of H ="),
    ("dot_product_attention", options(attn_mask=np.ones((1, 1))), "attn_mask is dtype('float64'), expected an array"),
    ("dot_product_attention", options(attn_mask=[[True]]), "attn_mask is 'list', expected an array of bool"),
    (
        "dot_product_attention",
        options(attn_mask=np.ones((1, 1, 1), bool)),
        "attn_mask.shape is (1, 1, 1), expected (Q, K) =",
    ),
    ("dot_product_attention", options(attn_mask=np.ones((1, 99), bool)), "attn_mask.shape is (1, 99), expected (Q, K)"),
    (
        "dot_product_attention",
        args(lambda q, k, v, bias, sinks: (q, k, v, np.zeros(99), sinks)),
        "attn_bias.shape is (99,), expected one that broadcasts to (B, H, Q, K) =",
    ),
    (
        "dot_product_attention",
        args(lambda q, k, v, bias, sinks: (q, k, v, np.zeros((1, 1, 1, 1, 1)), sinks)),
        "attn_bias.shape is (1, 1, 1, 1, 1), expected one that broadcasts",
    ),
    ("dot_product_attention", options(dropout_p=1.0), "dropout_p is 1.0, expected a probability less than 1"),
    ("dot_product_attention", options(dropout_p=-0.1), "dropout_p is -0.1, expected a probability less than 1"),
    (
        "dot_product_attention",
        options(dropout_p=0.5, dropout_keep=None),
        "dropout_p is 0.5, expected 0, or dropout_keep with it",
    ),
    (
        "dot_product_attention",
        args(lambda q, k, *rest: (q[..., :0], k[..., :0], *rest), given("scale", None)),
        "expected at least one feature, or a scale",
    ),
    ("dot_product_attention", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    ("dot_product_attention", options(scale=True), "scale is True, expected a finite number, or None"),
    ("dot_product_attention", options(softcap=0), "softcap is 0, expected more than 0, or None"),
    ("dot_product_attention", options(is_causal="top_left"), "is_causal is 'top_left', expected True, False or None"),
    ("dot_product_attention", options(window=2), "window is 2, expected None or (left, right)"),
    ("dot_product_attention", options(window=(1, 2, 3)), "window is (1, 2, 3), expected None or (left, right)"),
    ("dot_product_attention", options(window=(-1, 0)), "window is (-1, 0), expected None or (left, right), each None"),
    (
        "dot_product_attention",
        lambda c: options(kv_seqlens=np.full(len(c.args[0]), c.args[1].shape[2] + 1))(c),
        "kv_seqlens is",
    ),
    ("dot_product_attention", lambda c: options(q_seqlens=np.full(len(c.args[0]), -1))(c), "expected lengths from 0"),
    ("dot_product_attention", options(q_offset="diagonal"), "q_offset is 'diagonal', expected an int, 'top_left' or"),
    ("dot_product_attention", options(q_offset=True), "q_offset is True, expected an int, one for each of B ="),
    (
        "dot_product_attention",
        options(q_offset=None, convention=Convention(q_offset=0.5)),
        "q_offset is 0.5, expected an int, one for each of B =",
    ),
    ("dot_product_attention", options(q_offset=np.zeros(9, int)), "q_offset has shape (9,), expected (B,)"),
    ("transformer_encoder_layer", options(activation="swish"), "activation is 'swish', expected one of"),
    ("region_non_local", options(grid=0), "grid is 0, expected a positive int"),
    ("region_non_local", options(grid=40), "expected H and W of at least"),
    ("transformer_decoder_layer", options(activation="swish"), "activation is 'swish', expected one of"),
    ("pyramid_feature", first(lambda x: x[..., :-1]), "expected H / 2 and W / 2 of c1"),
    (
        "pyramid_feature",
        params(lambda p: p._replace(high=tree_map(lambda a: a.repeat(3, -1) if a.ndim == 4 else a, p.high))),
        "expected a 1 x 1 kernel",
    ),
    (
        "pyramid_feature",
        params(lambda p: p._replace(low=tree_map(lambda a: a.repeat(2, 0), p.low))),
        "expected as many outputs as params.high",
    ),
    ("rotary", args(lambda x, cos, sin: (x[..., :1], cos, sin)), "cos.shape is"),
    ("rotary", options(pairing="neox"), "pairing is 'neox', expected one of interleaved, half,"),
    ("alibi", options(queries=-1, keys=2, offset=0), "queries, keys, offset is (-1, 2, 0), expected ints"),
    ("alibi", options(queries=2, keys=2, offset=0.5), "queries, keys, offset is (2, 2, 0.5), expected ints"),
    ("alibi", options(form="absolute"), "form is 'absolute', expected one of distance, relative,"),
    ("t5_bias", options(queries=1, keys=2.0, offset=0), "queries, keys, offset is (1, 2.0, 0), expected ints"),
    ("t5_bias", args(lambda table: (table[:3],), given("bidirectional", True)), "N of table is 3, expected an even"),
    ("t5_bias", args(lambda table: (table[:1],), given("bidirectional", False)), "N of table is 1, expected 2 or more"),
    (
        "t5_bias",
        lambda c: Call((np.ones((8, 1)),), c.options | {"bidirectional": True, "max_distance": 2}),
        "max_distance is 2, expected more than 2, the exact",
    ),
    (
        "t5_bias",
        lambda c: Call((np.ones((5, 1)),), c.options | {"bidirectional": False, "max_distance": 2}),
        "max_distance is 2, expected more than 2, the exact",
    ),
    ("swin_bias", options(window=0), "window is 0, expected an int of at least 1"),
    ("swin_bias", options(window=(5, 6)), "expected 99 rows, from window (5, 6)"),
    ("sinusoidal", first(lambda x: x[..., 1:]), "expected a positive even number of features"),
    ("sinusoidal", first(lambda x: x[..., :0]), "expected a positive even number of features"),
    ("sinusoidal", options(scale=np.nan), "scale is nan, expected a finite number"),
    ("sinusoidal", options(base=0), "base is 0, expected more than 0"),
    ("sinusoidal", options(layout="paired"), "layout is 'paired', expected one of interleaved, concatenated"),
    ("sinusoidal", options(frequencies="linear"), "frequencies is 'linear', expected one of exclusive, inclusive"),
    ("xpos", first(lambda x: x[..., 1:]), "expected a positive even number of features"),
    ("xpos", first(lambda x: x[..., :0]), "expected a positive even number of features"),
    ("xpos", options(scale_base=0), "scale_base is 0, expected more than 0"),
    ("xpos", options(pairing="neox"), "pairing is 'neox', expected one of interleaved, half,"),
    ("shaw", args(lambda q, k, v, p: (q[..., :0], k[..., :0], v, p._replace(keys=p.keys[:, :0]))), "at least one feat"),
    ("shaw", params(lambda p: tree_map(lambda a: a.repeat(2, 0), p)), "expected an odd number of rows, 2 c + 1"),
    ("shaw", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    ("shaw", options(offset=1.5), "offset is 1.5, expected an int"),
    (
        "transformer_xl",
        args(lambda q, k, v, p: (q[..., :0], k[..., :0], v, tree_map(lambda a: a[:, :0], p))),
        "expected at least one feature",
    ),
    ("transformer_xl", args(lambda q, k, v, p: (q, k[:, :, :0], v[:, :, :0], p), given("mask", None)), "k.shape is"),
    ("transformer_xl", params(lambda p: p._replace(w_r=p.w_r[..., 1:])), "expected a positive even P"),
    ("transformer_xl", params(lambda p: p._replace(w_r=p.w_r[..., :0])), "expected a positive even P"),
    ("transformer_xl", options(clamp=-1), "clamp is -1, expected None, or at least 0"),
    ("transformer_xl", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    (
        "decomposed_2d",
        args(lambda q, k, v, p: (q[..., :0], k[..., :0], v, tree_map(lambda a: a[:, :0], p))),
        "expected at least one feature",
    ),
    ("decomposed_2d", options(prefix=-1), "prefix is -1, expected an int of at least 0"),
    ("decomposed_2d", options(size=(9, 9)), "expected Q = 8"),
    ("decomposed_2d", options(key_size=(9, 9)), "expected K = 8"),
    ("decomposed_2d", params(lambda p: p._replace(columns=p.columns[:0])), "params.columns.shape is"),
    ("decomposed_2d", options(scale=np.inf), "scale is inf, expected a finite number, or None"),
    ("axial_rotary", first(lambda x: x[..., :1]), "frequencies.shape is"),
    ("axial_rotary", options(pairing="neox"), "pairing is 'neox', expected one of interleaved, half,"),
    ("swin_v2", options(window=(5, 6)), "expected T = 30, from window (5, 6)"),
    ("swin_v2", options(pretrained=0), "pretrained is 0, expected an int of at least 1"),
    # --- mixed
    ("bam", options(combine="max"), "combine is 'max', expected 'mul' or 'add'"),
    (
        "cbam",
        lambda c: Call((c.args[0], c.args[1]._replace(spatial=None)), c.options) if c.options.get("stats") else None,
        "expected None, as params.spatial is",
    ),
    ("hybrid", options(channel="position"), "channel is 'position', expected None or one of squeeze_excitation,"),
    ("hybrid", options(self_attention=None), "params.self_attention is 'given', expected None, as self_attention is"),
    (
        "hybrid",
        lambda c: Call((c.args[0], type(c.args[1])()), dict.fromkeys(("channel", "spatial", "self_attention"))),
        "channel, spatial, self_attention is (None, None, None), expected at least one member",
    ),
    ("hybrid", options(arrangement="tree"), "arrangement is 'tree', expected one of sequence, parallel sum,"),
    ("hybrid", options(order=("channel", "spatial")), "order is ('channel', 'spatial'), expected the three of"),
    ("hybrid", options(options={"temporal": {}}), "options is {'temporal': {}}, expected a dict with keys out of"),
]


Q = np.ones((1, 2, 3, 4))

HELPERS = [  # functions beside forward that are called for themselves: a bad call, and how its error begins
    (lambda: alibi.slopes(0), "alibi.slopes: heads is 0, expected a positive int"),
    (lambda: axial_rotary.axial(1, 6), "axial_rotary.axial: features is 6, expected a positive multiple of 4, pairs"),
    (lambda: axial_rotary.axial(1, 0), "axial_rotary.axial: features is 0, expected a positive multiple of 4, pairs"),
    (lambda: axial_rotary.sections(1, np.ones(4), (1, 2)), "axial_rotary.sections: sizes is (1, 2), expected 4 in all"),
    (lambda: axial_rotary.mixed(None, 1, 6), "axial_rotary.mixed: features is 6, expected a positive multiple of 4"),
    (lambda: axial_rotary.mixed(None, 1, 0), "axial_rotary.mixed: features is 0, expected a positive multiple of 4"),
    (lambda: streaming.sampled(Q, Q, Q, rows=[3]), "streaming.sampled: rows is [3], expected a list of ints from 0"),
    (lambda: streaming.sampled(Q, Q, Q, rows=[0.5]), "streaming.sampled: rows is [0.5], expected a list of ints"),
    (lambda: streaming.sampled(Q, Q, Q, columns=[0]), "streaming.sampled: dout is None, expected the gradient of y"),
    (
        lambda: streaming.sampled(Q, Q, Q, columns=[0], dout=Q[..., :2]),
        "streaming.sampled: dout, of y: shape is (1, 2, 3, 2), expected (B, H, Q, E) = (1, 2, 3, 4)",
    ),
    (
        lambda: streaming.sampled(Q, Q, Q, columns=[0], dout=Q, y=Q[:, :1], lse=Q[..., 0]),
        "streaming.sampled: y.shape is (1, 1, 3, 4), expected (1, 2, 3, 4), one for every query",
    ),
    (
        lambda: streaming.sampled(Q, Q, Q, columns=[0], dout=Q, y=Q, lse=Q),
        "streaming.sampled: lse.shape is (1, 2, 3, 4), expected (1, 2, 3), one for every query",
    ),
    (
        lambda: streaming.forward_backward(Q, Q, Q, dout=[1]),
        "streaming.forward_backward: dout is 'list', expected an array, or an Out where lse is returned",
    ),
    (
        lambda: streaming.forward_backward(Q, Q, Q, dout=streaming.Out(Q, Q[..., 0, 0]), return_lse=True),
        "streaming.forward_backward: dout, of lse: shape is (1, 2), expected (1, 2, 3)",
    ),
    (
        lambda: packed.pad(np.ones((3, 1, 1)), np.array([0, 2, 1, 3])),
        "packed.pad: cu_seqlens is [0, 2, 1, 3], expected offsets from 0 to 3, the number of tokens, that never",
    ),
    (lambda: packed.unpad(np.ones((2, 1, 1, 1)), np.array([])), "packed.unpad: cu_seqlens has dtype float64, expected"),
    (lambda: packed.unpad(np.ones((2, 1, 1, 1)), np.array([], int)), "packed.unpad: cu_seqlens is [], expected offset"),
    (
        lambda: packed.unpad(np.ones((2, 1, 1, 1)), np.array([0, 1, 3])),
        "packed.unpad: x.shape is (2, 1, 1, 1), expected 2 sequences, as long as 2",
    ),
    (lambda: rotary.frequencies(0), "rotary.frequencies: features is 0, expected a positive even int"),
    (lambda: rotary.frequencies(3), "rotary.frequencies: features is 3, expected a positive even int"),
    (lambda: rotary.ntk(2, 8.0), "rotary.ntk: features is 2, expected more than 2"),
    (lambda: rotary.yarn(8, 4.0, 64, ramp="cubic"), "rotary.yarn: ramp is 'cubic', expected 'rounded', 'unrounded' or"),
    (
        lambda: rotary.yarn(8, 4.0, 0.1),
        "rotary.yarn: original_length is 0.1, expected a length in which some pair turns",
    ),
    (lambda: rotary.yarn(8, 4.0, 1e12), "rotary.yarn: original_length is 1000000000000.0, expected a length in which"),
    (lambda: rotary.yarn(8, 4.0, 64, beta_slow=32.0), "rotary.yarn: beta_slow is 32.0, expected less than beta_fast"),
]


def change(name, how):
    """The first drawn call of a mechanism that the row suits, changed."""
    for seed in SEEDS:
        changed = how(everything()[name].example(RandomDraw(seed)))
        if changed is not None:
            return changed
    raise LookupError(f"{name}: no drawn call suits this row")


@pytest.mark.parametrize(("name", "how", "words"), BAD, ids=[f"{name}-{words}" for name, _, words in BAD])
def test_refused(name, how, words):
    call = change(name, how)
    with pytest.raises((ValueError, TypeError)) as caught:
        everything()[name].forward(*call.args, **call.options)
    message = str(caught.value)
    assert words in message and "expected" in message, message
    assert re.match(rf"({'|'.join(everything())})\.\w+: ", message), f"{message} - whose argument?"


@pytest.mark.parametrize(("run", "words"), HELPERS, ids=[words for _, words in HELPERS])
def test_helpers_refuse(run, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        run()
    assert str(caught.value).startswith(words)


INSIDE = [  # the last value that is still good, and what it is the same as
    ("log_softmax", lambda s: ({"axis": -s.ndim}, {"axis": 0})),
    ("softmax", lambda s: ({"axis": -s.ndim}, {"axis": 0})),
    ("softmax_plus_one", lambda s: ({"axis": -s.ndim}, {"axis": 0})),
    ("gumbel_softmax", lambda s: ({"axis": -s.ndim}, {"axis": 0})),
    ("top_k_softmax", lambda s: ({"axis": -s.ndim, "k": 2}, {"axis": 0, "k": 2})),
    ("sparsemax", lambda s: ({"axis": -s.ndim}, {"axis": 0})),
    ("entmax", lambda s: ({"axis": -s.ndim}, {"axis": 0})),
    ("logsumexp", lambda s: ({"axis": -s.ndim}, {"axis": 0})),
]


@pytest.mark.parametrize("name, options", INSIDE, ids=[name for name, _ in INSIDE])
def test_the_last_good_value(name, options):
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    a, b = (everything()[name].forward(x, **some)[0] for some in options(x))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_layer_norm_over_everything(shape):
    x, dy = np.random.default_rng(0).normal(size=(2, *shape))
    (y, saved), (z, flat) = layer_norm.forward(x, axes=x.ndim), layer_norm.forward(x.reshape(1, -1))
    dx, dz = layer_norm.backward(dy, saved)[0], layer_norm.backward(dy.reshape(1, -1), flat)[0]
    assert np.allclose(y.ravel(), z[0], rtol=1e-14) and np.allclose(dx.ravel(), dz[0], rtol=1e-13)


def test_the_first_id_may_be_padding():
    table = np.random.default_rng(0).normal(size=(3, 2))
    _, saved = embedding.forward(table, ids=np.array([0, 2]), padding_idx=0)
    assert np.array_equal(embedding.backward(table[:2], saved)[0], [[0, 0], [0, 0], table[1]])


def expect_sites():
    """Where `expect` is called below primitives/ and attention/, and in windows.py: {file: [(first, last line)]}."""
    files = [ROOT / "windows.py", *(ROOT / "primitives").glob("*.py"), *(ROOT / "attention").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "expect":
                yield str(path), node.lineno, node.end_lineno


def forward(name, how):
    call = change(name, how)
    return lambda: everything()[name].forward(*call.args, **call.options)


def fired(run):
    """The file and line of the `expect` that a bad call sets off."""
    try:
        run()
    except (ValueError, TypeError) as error:
        frames, frame = [], error.__traceback__
        while frame is not None:
            frames.append((frame.tb_frame.f_code.co_name, frame.tb_frame.f_code.co_filename, frame.tb_lineno))
            frame = frame.tb_next
        if frames[-1][0] == "expect":
            return frames[-2][1:]
    return None


def test_every_check_is_reached():
    bad = [forward(name, how) for name, how, _ in BAD] + [run for run, _ in HELPERS]
    lines = {line for line in map(fired, bad) if line}
    silent = [
        f"{Path(path).name}:{start}"
        for path, start, end in expect_sites()
        if not any(file == path and start <= line <= end for file, line in lines)
    ]
    assert not silent, f"checks that no row of BAD sets off: {silent}"
