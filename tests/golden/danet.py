"""DANet: the authors' position and channel attention, and the head that adds them."""

from refattn.attention.channel import channel_self
from refattn.attention.mixed import dual
from refattn.attention.spatial import position
from refattn.primitives import batch_norm, conv, conv_norm_relu, linear
from tests.golden import Case


def case(record):
    return {"PAM_Module": _position, "CAM_Module": _channel, "DANetHead": _head}[record.meta["cls"]](record)


def _position(record):
    def args(get):
        return get("in.x"), position_params(get, "param.")

    return Case(position, args, lambda get: get("out.y"), mid=lambda out, saved: {"attention": saved.weights})


def _channel(record):
    def args(get):
        return get("in.x"), channel_self.Params(get("param.gamma"))

    def mid(out, saved):
        return {"energy": saved.energy, "attention": saved.weights}

    return Case(channel_self, args, lambda get: get("out.y"), mid=mid)


def position_params(get, prefix):
    def pointwise(name):
        weight = get(f"{prefix}{name}.weight")
        return linear.Params(weight.reshape(weight.shape[:2]), get(f"{prefix}{name}.bias"))

    return position.Params(
        pointwise("query_conv"), pointwise("key_conv"), pointwise("value_conv"), get(f"{prefix}gamma")
    )


NORMS = dual.Stats(position_in="conv5a.1", position_out="conv51.1", channel_in="conv5c.1", channel_out="conv52.1")


def _head(record):
    before = dual.Stats(
        *(batch_norm.Stats(record[f"buf.{n}.running_mean"], record[f"buf.{n}.running_var"]) for n in NORMS)
    )

    def args(get):
        def block(name):
            norm = batch_norm.Params(get(f"param.{name}.1.weight"), get(f"param.{name}.1.bias"))
            return conv_norm_relu.Params(conv.Params(get(f"param.{name}.0.weight")), norm)

        def classifier(name):
            return conv.Params(get(f"param.{name}.1.weight"), get(f"param.{name}.1.bias"))

        return get("in.x"), dual.Params(
            position_in=block("conv5a"),
            position=position_params(get, "param.sa."),
            position_out=block("conv51"),
            channel_in=block("conv5c"),
            channel=channel_self.Params(get("param.sc.gamma")),
            channel_out=block("conv52"),
            classify_both=classifier("conv8"),
            classify_position=classifier("conv6"),
            classify_channel=classifier("conv7"),
        )

    def out(get):
        return dual.Out(get("out.sasc"), get("out.sa"), get("out.sc"))

    def after(saved):
        buffers = {}
        for field, name in NORMS._asdict().items():
            stats = batch_norm.running(getattr(before, field), getattr(saved, field).norm)
            buffers |= {f"{name}.running_mean": stats.mean, f"{name}.running_var": stats.var}
        return buffers

    stats = None if record.training else before
    return Case(dual, args, out, {"stats": stats}, after if record.training else None)
