"""ECA: the official module, and the official module with weights of its own for every channel."""

from refattn.attention.channel import efficient_channel
from tests.golden import Case


def case(record):
    def args(get):
        return get("in.x"), efficient_channel.Params(get("param.conv.weight")[:, 0, :])

    def mid(out, saved):
        return {"pool": saved.z[:, :, None, None], "gate": saved.gate[:, :, None, None]}

    return Case(efficient_channel, args, lambda get: get("out.y"), mid=mid if "mid.gate" in record else None)
