"""torch.nn primitives."""

from refattn.primitives import batch_norm, conv, linear, softmax
from tests.golden import Case


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
