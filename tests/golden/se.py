"""Squeeze-and-excitation: the official Caffe graphs, and a port without biases."""

from refattn.attention.channel import squeeze_excitation
from refattn.elementwise import relu
from tests.golden import Case


class ReluAfter:
    """The official residual block ends with a ReLU after the layer that squeeze_excitation is."""

    @staticmethod
    def forward(*args):
        y, saved = squeeze_excitation.forward(*args)
        return relu(y), (y, saved)

    @staticmethod
    def backward(dout, saved):
        y, inner = saved
        return squeeze_excitation.backward(dout * (y > 0), inner)


def case(record):
    port = "param.fc.0.weight" in record
    residual = len(record.names("in")) == 2
    x, shortcut = ("in.conv2_1_1x1_increase", "in.conv2_1_1x1_proj") if residual else ("in.x", None)
    down, up = ("param.fc.0", "param.fc.2") if port else _layers(record)

    def args(get):
        params = squeeze_excitation.Params(
            w1=_matrix(get(f"{down}.weight")),
            w2=_matrix(get(f"{up}.weight")),
            b1=get(f"{down}.bias", optional=True),
            b2=get(f"{up}.bias", optional=True),
        )
        return get(x), params, get(shortcut) if residual else None

    def mid(out, saved):
        return {"squeeze": saved.z[:, :, None, None], "gate": saved.gate[:, :, None, None]}

    module = ReluAfter if residual else squeeze_excitation
    return Case(module, args, lambda get: get("out.y"), mid=mid if "mid.gate" in record else None)


def _layers(record):
    """The layers are named after their place in the network: conv2_1_1x1_down, inception_3a_1x1_down."""
    down = next(name for name in record.names("param") if name.endswith("_down.weight")).removesuffix(".weight")
    return down, down.removesuffix("_down") + "_up"


def _matrix(weight):
    """A 1x1 convolution (O, I, 1, 1), or a linear layer (O, I)."""
    return weight.reshape(weight.shape[:2])
