"""DANet: the authors' position and channel attention, and the head that adds them."""

from refattn.attention.channel import channel_self
from refattn.attention.spatial import position
from refattn.primitives import linear
from tests.golden import Case


def case(record):
    return {"PAM_Module": _position, "CAM_Module": _channel}[record.meta["cls"]](record)


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
