"""DANet: the authors' position and channel attention, and the head that adds them."""

from refattn.attention.spatial import position
from refattn.primitives import linear
from tests.golden import Case


def case(record):
    return {"PAM_Module": _position}[record.meta["cls"]](record)


def _position(record):
    def args(get):
        return get("in.x"), position_params(get, "param.")

    return Case(position, args, lambda get: get("out.y"), mid=lambda out, saved: {"attention": saved.weights})


def position_params(get, prefix):
    def pointwise(name):
        weight = get(f"{prefix}{name}.weight")
        return linear.Params(weight.reshape(weight.shape[:2]), get(f"{prefix}{name}.bias"))

    return position.Params(
        pointwise("query_conv"), pointwise("key_conv"), pointwise("value_conv"), get(f"{prefix}gamma")
    )
