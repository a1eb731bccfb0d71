"""Luong, Pham and Manning's MATLAB, TensorFlow Addons' LuongAttention, and the PyTorch chatbot tutorial."""

from types import SimpleNamespace

import numpy as np

from refattn.attention.temporal import (
    local_attention,
    luong_chatbot,
    luong_decoder,
    luong_encoder_decoder,
    multiplicative,
)
from refattn.primitives import linear, lstm_cell, recurrent
from tests.golden import Case
from tests.golden.bahdanau import tfa_options, tfa_wrapper
from tests.golden.rnn import cell_params


def case(record):
    family, kind, *_ = record.meta["case"].split("_")
    return {"matlab": _matlab, "chatbot": _chatbot, "tfa": _tfa}[family](record, kind)


# --- MATLAB: columns are the batch; sources are stored reversed, their padding in front ---------------------


def _matlab(record, kind):
    ctor, lengths = record.ctor, record["in.lens"] - 1  # without the end of the sentence
    is_local, score = ctor["attnFunc"] != 1, {1: "dot", 2: "general", 3: "concat_matlab"}[ctor["attnOpt"]]
    options = {"lengths": lengths, "score": score, "feed": ctor["feedInput"]}
    if is_local:
        options |= {"window": ctor["posWin"], "gaussian": "scores" if ctor["normLocalAttn"] else "weights"}

    def args(get):
        encoder = recurrent.Params((_matlab_cell(get("param.W_src")),))
        cells = recurrent.Params((_matlab_cell(get("param.W_tgt")),))
        attention = _matlab_attention(get, score)
        if is_local:
            attention = local_attention.Params(attention, _matlab_position(get) if ctor["attnFunc"] == 4 else None)
        decoder = luong_decoder.Params(cells, attention, linear.Params(get("param.W_h")))
        source, target = get("in.src_emb")[::-1].swapaxes(0, 1), get("in.tgt_emb").swapaxes(0, 1)
        return source, target, luong_encoder_decoder.Params(encoder, decoder)

    def out(get):
        state = recurrent.State(get("out.h").T[:, None], get("out.c").T[:, None])
        return luong_decoder.Out(get("out.attn_vec").transpose(2, 0, 1), state)

    def mid(out, saved):
        weights = saved.weights
        if is_local:
            window = _centres(saved, lengths)[:, :, None] - np.arange(-ctor["posWin"], ctor["posWin"] + 1)
            inside = (window >= 0) & (window < weights.shape[2])
            align = np.where(inside, np.take_along_axis(weights, np.where(inside, window, 0), axis=2), 0)
        else:
            align = weights[:, :, ::-1]
        return {"align": align.transpose(1, 2, 0)}

    return Case(luong_encoder_decoder, args, out, options, mid=mid)


def _matlab_cell(weight):
    """Rows are the gates i, f, o, a; columns are [x; h]."""
    gates = weight.reshape(4, -1, weight.shape[1])[[0, 1, 3, 2]]
    hidden = gates.shape[1]
    return lstm_cell.Params(gates[:, :, :-hidden], gates[:, :, -hidden:])


def _matlab_attention(get, score):
    if score == "dot":
        return multiplicative.Params()
    if score == "general":
        return multiplicative.Params(get("param.W_a").T)
    return multiplicative.Params(get("param.W_a"), v=get("param.v_a")[0])


def _matlab_position(get):
    return local_attention.Position(get("param.W_pos"), get("param.v_pos")[0])


def _centres(saved, lengths):
    """The middle of every window, (N, T)."""
    attended = [attended for _, attended, _ in saved.decoded.steps]
    if attended[0].predicted is None:
        return np.minimum(np.arange(len(attended)), lengths[:, None] - 1)
    p = np.concatenate([-a.predicted.offset[:, :, 0] for a in attended], axis=1)  # the offset is s - p; here s = 0
    return np.floor(p).astype(int)


# --- PyTorch's tutorial: time first -------------------------------------------------------------------------


def _chatbot(record, kind):
    return (_chatbot_attention if kind == "attn" else _chatbot_encoder_decoder)(record)


def _chatbot_attention(record):
    def args(get):
        return get("in.hidden").swapaxes(0, 1), get("in.encoder_outputs").swapaxes(0, 1), _chatbot_score(get, "param.")

    return Case(WEIGHTS_ALONE, args, lambda get: get("out.weights"), {"score": record.ctor["method"]})


def _chatbot_score(get, prefix):
    weight, bias, v = (get(prefix + name, optional=True) for name in ("attn.weight", "attn.bias", "v"))
    return multiplicative.Params(weight, bias, v)


def _weights(*args, **options):
    out, saved = multiplicative.forward(*args, **options)
    return out.weights, saved


def _weights_backward(dweights, saved):
    nothing = np.zeros((*dweights.shape[:2], saved.memory.shape[2]))
    return multiplicative.backward(multiplicative.Out(nothing, dweights), saved)


# multiplicative attention without its context: the tutorial makes that elsewhere
WEIGHTS_ALONE = SimpleNamespace(__name__=multiplicative.__name__, forward=_weights, backward=_weights_backward)


def _chatbot_encoder_decoder(record):
    def args(get):
        encoder = tuple(cell_params(get, "GRU", end, "encoder.gru.") for end in ("_l0", "_l0_reverse"))
        cells = recurrent.Params((cell_params(get, "GRU", "_l0", "decoder.gru."),))
        hidden, context = np.split(get("param.decoder.concat.weight"), 2, axis=1)
        combine = linear.Params(np.concatenate([context, hidden], axis=1), get("param.decoder.concat.bias"))
        decoder = luong_decoder.Params(cells, _chatbot_score(get, "param.decoder.attn."), combine)
        word = linear.Params(get("param.decoder.out.weight"), get("param.decoder.out.bias"))
        params = luong_chatbot.Params(get("param.embedding.weight"), recurrent.Params(encoder), decoder, word)
        return (params,)

    def out(get):
        state = recurrent.State(get("out.dec_hidden").swapaxes(0, 1))
        return luong_chatbot.Out(get("out.probs").swapaxes(0, 1), state)

    # The decoder is taken to read tgt as it stands: INDEX.md names a start symbol for Bahdanau's tutorial, none here.
    options = {"source": record["in.src"].T, "target": record["in.tgt"].T, "lengths": record["in.lengths"]}
    return Case(luong_chatbot, args, out, options | {"score": record.ctor["method"]})


# --- TensorFlow Addons: batch first; kernels are (in, out), without bias ------------------------------------


def _tfa(record, kind):
    return _tfa_attention(record) if kind == "attn" else tfa_wrapper(record, _tfa_params)


def _tfa_attention(record):
    def args(get):
        return get("in.query")[:, None], get("in.memory"), _tfa_params(get)

    def out(get):
        return multiplicative.Out(get("out.context")[:, None], get("out.alignments")[:, None])

    return Case(multiplicative, args, out, tfa_options(record))


def _tfa_params(get, prefix=""):
    """score="general", times a scale where there is one."""
    kernel, scale = get(f"param.{prefix}memory_layer/kernel"), get(f"param.{prefix}attention_g", optional=True)
    return multiplicative.Params(kernel.T, scale=scale)
