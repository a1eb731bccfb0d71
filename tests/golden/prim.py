"""torch.nn primitives."""

from types import SimpleNamespace

from refattn.elementwise import sigmoid
from refattn.primitives import (
    adaptive_average_pool,
    batch_norm,
    bilinear_resize,
    conv,
    gru_cell,
    linear,
    log_softmax,
    lstm_cell,
    max_pool,
    softmax,
)
from tests.golden import Case
from tests.golden.rnn import cell_params


def case(record):
    return globals()[f"_{record.meta['case'].partition('_')[0]}"](record)


def _out(get):
    return get("out.y")


def _x(get):
    return (get("in.x"),)


def _options(record, **names):
    """What the constructor was given, under our names: _options(record, kernel="kernel_size")."""
    given = {ours: record.ctor[theirs] for ours, theirs in names.items() if theirs in record.ctor}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _linear(record):
    def args(get):
        return get("in.x"), linear.Params(get("param.weight"), get("param.bias", optional=True))

    return Case(linear, args, _out)


def _conv(record):
    def args(get):
        return get("in.x"), conv.Params(get("param.weight"), get("param.bias", optional=True))

    options = _options(record, stride="stride", padding="padding", dilation="dilation", groups="groups")
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


def _maxpool(record):
    options = _options(record, kernel="kernel_size", stride="stride", padding="padding", dilation="dilation")
    return Case(max_pool, _x, _out, options)


_maxpool2d = _maxpool3d = _maxpool


def _global(record):
    return Case(adaptive_average_pool, _x, _out, _options(record, size="output_size"))


def _upsample(record):
    size = tuple(length * record.ctor["scale_factor"] for length in record["in.x"].shape[2:])
    return Case(bilinear_resize, _x, _out, {"size": size, "align_corners": record.ctor["align_corners"]})


def _softmax(record):
    return Case(softmax, _x, _out, _options(record, axis="dim"))


def _logsoftmax(record):
    return Case(log_softmax, _x, _out, _options(record, axis="dim"))


def _sigmoid(record):
    def forward(x):
        s = sigmoid(x)
        return s, s

    names = {"__name__": sigmoid.__module__, "forward": forward, "backward": lambda ds, s: (ds * s * (1 - s),)}
    return Case(SimpleNamespace(**names), _x, _out)


def _grucell(record):
    return Case(gru_cell, lambda get: (get("in.x"), get("in.h"), cell_params(get, "GRU")), _out)


def _lstmcell(record):
    def args(get):
        return get("in.x"), lstm_cell.State(get("in.h"), get("in.c")), cell_params(get, "LSTM")

    return Case(lstm_cell, args, lambda get: lstm_cell.State(get("out.h1"), get("out.c1")))
