"""Bahdanau attention: the authors' GroundHog code, TensorFlow Addons, the PyTorch tutorial."""

from types import SimpleNamespace

import numpy as np

from refattn.attention.temporal import additive, additive_decoder, attention_wrapper, rnn_search
from refattn.primitives import gru_cell, linear, lstm_cell, recurrent
from tests.golden import Case, rnn


def case(record):
    origin, what, *_ = record.meta["case"].split("_")
    return globals()[f"_{origin}" if origin == "groundhog" else f"_{origin}_{what}"](record)


def _mask(lengths, steps):
    return np.arange(steps) < lengths[:, None]


# --- GroundHog: time first, weights (in, out), gates apart ---------------------------------------------------


def _groundhog(record):
    def gates(get, *names):
        return [get(name) for name in names]

    def args(get):
        inputs = gates(get, "in.reseter_below", "in.updater_below", "in.state_below")
        contexts = gates(get, "param.dec_reseter_W", "param.dec_updater_W", "param.dec_inputter_W")
        states = gates(get, "param.R_hh", "param.G_hh", "param.W_hh")
        attention = additive.Params(
            linear.Params(get("param.B_hp").T), linear.Params(get("param.A_cp").T), get("param.D_pe")[:, 0]
        )
        return (
            np.stack(inputs, axis=2).swapaxes(0, 1),
            get("in.c").swapaxes(0, 1),
            get("in.h0"),
            additive_decoder.Params(attention, *(np.stack(w).swapaxes(1, 2) for w in (contexts, states))),
        )

    def out(get):
        return additive_decoder.Out(get("out.h").swapaxes(0, 1), get("out.ctx").swapaxes(0, 1))

    masks = {"mask": "in.c_mask", "target_mask": "in.mask"}
    options = {name: record[key].T > 0 for name, key in masks.items() if key in record}
    mid = {"mid": lambda out, saved: {"alignment": saved.weights.transpose(1, 2, 0)}}
    return Case(additive_decoder, args, out, options, **mid)


# --- TensorFlow Addons: kernels (in, out) ---------------------------------------------------------------------


def _tfa_params(get, prefix=""):
    def optional(name):
        return get(f"param.{prefix}{name}", optional=True)

    return additive.Params(
        linear.Params(get(f"param.{prefix}query_layer/kernel").T, optional("attention_b")),
        linear.Params(get(f"param.{prefix}memory_layer/kernel").T),
        get(f"param.{prefix}attention_v"),
        g=optional("attention_g"),
    )


def _tfa_attn(record):
    def args(get):
        return get("in.query")[:, None], get("in.memory"), _tfa_params(get)

    def out(get):
        return additive.Out(get("out.context")[:, None], get("out.alignments")[:, None])

    return Case(additive, args, out, tfa_options(record))


def tfa_options(record):
    steps = record["in.memory"].shape[1]
    return {"mask": _mask(record["in.lengths"], steps)} if "in.lengths" in record else {}


def _tfa_wrapper(record):
    return tfa_wrapper(record, _tfa_params)


def tfa_wrapper(record, attention):
    """Of either attention: `attention(get, prefix)` builds its Params."""
    lstm = record.ctor["cell"] == "lstm"
    output = "attention" if record.ctor["output_attention"] else "cell"

    def args(get):
        cells = recurrent.Params((keras_cell(get, record.ctor["cell"], "cell/"),))
        layer = linear.Params(get("param.attention_layer/kernel").T)
        params = attention_wrapper.Params(cells, attention(get, "attention_mechanism/"), layer)
        state = recurrent.State(get("in.h0")[:, None], get("in.c0")[:, None] if lstm else None)
        return get("in.inputs"), get("in.memory"), state, params

    def out(get):
        names = "out.outputs", "out.alignments", "out.last_attention"
        return attention_wrapper.Out(*map(get, names), recurrent.State(get("out.last_h")[:, None]))

    return Case(_WITHOUT_C if lstm else attention_wrapper, args, out, tfa_options(record) | {"output": output})


def keras_cell(get, kind, prefix=""):
    """Keras stacks the gates side by side, z, r, h of a GRU and i, f, c, o of an LSTM."""
    order = {"gru": [1, 0, 2], "lstm": [0, 1, 2, 3]}[kind]

    def gates(weights):
        return np.stack(np.split(weights, len(order), axis=-1))[order]

    w_x, w_h = (gates(get(f"param.{prefix}{name}")).swapaxes(1, 2) for name in ("kernel", "recurrent_kernel"))
    bias = get(f"param.{prefix}bias")
    return gru_cell.Params(w_x, w_h, *map(gates, bias)) if kind == "gru" else lstm_cell.Params(w_x, w_h, gates(bias))


def _forward_without_c(*args, **options):
    out, saved = attention_wrapper.forward(*args, **options)
    return out._replace(state=recurrent.State(out.state.h)), saved


def _backward_without_c(dout, saved):
    h = dout.state.h
    return attention_wrapper.backward(dout._replace(state=recurrent.State(h, np.zeros_like(h))), saved)


_WITHOUT_C = SimpleNamespace(  # the recordings have h of the last state, but not c
    forward=_forward_without_c, backward=_backward_without_c, __name__=attention_wrapper.__name__
)


# --- the PyTorch tutorial -------------------------------------------------------------------------------------


def _tutorial_params(get, prefix=""):
    def layer(name):
        return linear.Params(get(f"param.{prefix}{name}.weight"), get(f"param.{prefix}{name}.bias"))

    (v,), (b,) = layer("Va")
    return additive.Params(layer("Wa"), layer("Ua"), v, np.asarray(b))


def _tutorial_attn(record):
    def args(get):
        return get("in.query"), get("in.keys"), _tutorial_params(get)

    def out(get):
        return additive.Out(get("out.context"), get("out.weights")[:, None])

    return Case(additive, args, out)


def _tutorial_encdec(record):
    """The GRU of the decoder reads [word; context]: the columns of its weights fall in two."""
    features = record["param.decoder.embedding.weight"].shape[1]

    def args(get):
        w, w_h, b, b_h = rnn.cell_params(get, "GRU", "_l0", "decoder.gru.")
        attention = _tutorial_params(get, "decoder.attention.")
        params = rnn_search.Params(
            source=get("param.encoder.embedding.weight"),
            encoder=recurrent.Params((rnn.cell_params(get, "GRU", "_l0", "encoder.gru."),)),
            target=get("param.decoder.embedding.weight"),
            read=linear.Params(w[..., :features].reshape(-1, features), b.reshape(-1)),
            decoder=additive_decoder.Params(attention, w[..., features:], w_h, b_h),
            word=linear.Params(get("param.decoder.out.weight"), get("param.decoder.out.bias")),
        )
        return (params,)

    def out(get):
        return rnn_search.Out(get("out.logprobs"), get("out.dec_hidden")[0])

    start = np.zeros_like(record["in.tgt"][:, :1])
    target = np.concatenate([start, record["in.tgt"][:, :-1]], axis=1)
    return Case(rnn_search, args, out, {"source": record["in.src"], "target": target, "gru": "torch"})
