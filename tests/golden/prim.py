"""torch.nn primitives."""

from refattn.primitives import batch_norm, conv, gru_cell, linear, lstm_cell, softmax
from tests.golden import Case
from tests.golden.rnn import cell_params


def case(record):
    return globals()[f"_{record.meta['case'].partition('_')[0]}"](record)


def _out(get):
    return get("out.y")


def _linear(record):
    def args(get):
        return get("in.x"), linear.Params(get("param.weight"), get("param.bias", optional=True))

    return Case(linear, args, _out)


def _conv(record):
    options = {key: record.ctor[key] for key in ("stride", "padding", "dilation", "groups") if key in record.ctor}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}

    def args(get):
        return get("in.x"), conv.Params(get("param.weight"), get("param.bias", optional=True))

    return Case(conv, args, _out, options)


_conv1d = _conv2d = _conv


def _batchnorm(record):
    before = batch_norm.Stats(record["buf.running_mean"], record["buf.running_var"])
    momentum = record.ctor.get("momentum", 0.1)

    def after(saved):
        stats = batch_norm.running(before, saved, momentum=momentum)
        return {"running_mean": stats.mean, "running_var": stats.var}

    return Case(
        batch_norm,
        lambda get: (get("in.x"), batch_norm.Params(get("param.weight"), get("param.bias"))),
        _out,
        {"eps": record.ctor.get("eps", 1e-5), "stats": None if record.training else before},
        after if record.training else None,
    )


_batchnorm1d = _batchnorm2d = _batchnorm


def _softmax(record):
    return Case(softmax, lambda get: (get("in.x"),), _out, {"axis": record.ctor["dim"]})


def _grucell(record):
    return Case(gru_cell, lambda get: (get("in.x"), get("in.h"), cell_params(get, "GRU")), _out)


def _lstmcell(record):
    def args(get):
        return get("in.x"), lstm_cell.State(get("in.h"), get("in.c")), cell_params(get, "LSTM")

    return Case(lstm_cell, args, lambda get: lstm_cell.State(get("out.h1"), get("out.c1")))
