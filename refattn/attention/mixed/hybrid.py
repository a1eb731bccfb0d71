r"""Mixed attention: channel gate, spatial gate and self-attention.

One of each family, one after the other or side by side; the backward is made of theirs.

Paper: Woo, Park, Lee and Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018 (arXiv:1807.06521),
section 4.1, which compares the arrangements of a channel and a spatial gate.

Shapes
    N images, C channels, H by W pixels; every member keeps them. f_k is member k of K, in the given order.

Forward
    y = f_K(... f_2(f_1(x)))                  in sequence
    y = sum_k f_k(x),   or 1/K of it          in parallel

Backward, with a bar for "gradient of the loss with respect to"
    xbar = f_1's gradient of ... f_{K-1}'s gradient of f_K's gradient of ybar         in sequence
    xbar = the sum of all members' gradients of ybar, or of ybar / K                  in parallel

Choices
    A member is named, or None: then its params and their gradient are None, and the others work without it. A member
    without params (simam) has None too. `options` holds further arguments of each member, by place:
    options={"spatial": {"stats": stats}, "self_attention": {"pool": None}}.
    Mechanisms that make new channels (selective_kernel, split_attention) are convolutions, and no members.
    pyramid_spatial puts out its gate; all others put out their input, gated or added to.
"""

from itertools import permutations
from typing import NamedTuple

from refattn.attention.channel import (
    bam_channel,
    cbam_channel,
    channel_self,
    efficient_channel,
    second_order_channel,
    simam,
    squeeze_excitation,
)
from refattn.attention.spatial import bam_spatial, cbam_spatial, non_local, position, pyramid_spatial, region_non_local
from refattn.core import About, Array, Call, Shaped, expect, shaped

PLACES = ("channel", "spatial", "self_attention")
ARRANGEMENTS = ("sequence", "parallel sum", "parallel mean")


def _by_name(*modules):
    return {module.__name__.rpartition(".")[2]: module for module in modules}


MEMBERS = {
    "channel": _by_name(
        squeeze_excitation, efficient_channel, second_order_channel, simam, cbam_channel, bam_channel, channel_self
    ),
    "spatial": _by_name(cbam_spatial, bam_spatial, pyramid_spatial),
    "self_attention": _by_name(position, channel_self, non_local, region_non_local),
}


class Params(NamedTuple):
    channel: tuple | None = None  # of each member its own Params
    spatial: tuple | None = None
    self_attention: tuple | None = None


class Saved(NamedTuple):
    channel: tuple | None  # of each member its own Saved
    spatial: tuple | None
    self_attention: tuple | None
    members: tuple  # pairs (place, name), in the order of the sequence
    arrangement: str


def init(rng, channels, *, channel="squeeze_excitation", spatial="cbam_spatial", self_attention="position"):
    """Each member as its own file starts it."""
    chosen = zip(PLACES, (channel, spatial, self_attention))
    return Params(*(None if name is None else _start(MEMBERS[place][name], rng, channels) for place, name in chosen))


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Params,
    *,
    channel: str | None = "squeeze_excitation",
    spatial: str | None = "cbam_spatial",
    self_attention: str | None = "position",
    arrangement: str = "sequence",
    order: tuple = PLACES,
    options: dict | None = None,
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    names, options = dict(zip(PLACES, (channel, spatial, self_attention))), options or {}
    _check(names, params, arrangement, order, options)
    members = tuple((place, names[place]) for place in order if names[place] is not None)
    saved = dict.fromkeys(PLACES)

    def member(place, name, x):
        arrays = (x,) if getattr(params, place) is None else (x, getattr(params, place))
        y, saved[place] = MEMBERS[place][name].forward(*arrays, **options.get(place, {}))
        return y

    if arrangement == "sequence":
        y = x
        for place, name in members:
            y = member(place, name, y)
    else:
        y = sum(member(place, name, x) for place, name in members) / _divisor(arrangement, members)
    return y, Saved(**saved, members=members, arrangement=arrangement)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    members, dparams = saved.members, dict.fromkeys(PLACES)

    def member_backward(place, name, dy):
        dx, *rest = MEMBERS[place][name].backward(dy, getattr(saved, place))
        dparams[place] = rest[0] if rest else None
        return dx

    if saved.arrangement == "sequence":
        dx = dy
        for place, name in reversed(members):
            dx = member_backward(place, name, dx)
    else:
        dy = dy / _divisor(saved.arrangement, members)
        dx = sum(member_backward(place, name, dy) for place, name in members)
    return dx, Params(**dparams)


def _divisor(arrangement, members):
    return len(members) if arrangement == "parallel mean" else 1


def _start(member, rng, channels):
    if member is simam:
        return None
    if member in (cbam_spatial, channel_self):  # their sizes do not depend on the channels
        return member.init(rng)
    return (non_local if member is region_non_local else member).init(rng, channels)


def _check(names, params, arrangement, order, options):
    where = "hybrid.forward:"
    for place, name in names.items():
        known = MEMBERS[place]
        expect(name is None or name in known, f"{where} {place}", name, f"None or one of {', '.join(known)}")
        unused = name is None and getattr(params, place) is not None
        expect(not unused, f"{where} params.{place}", "given", f"None, as {place} is")
    expect(any(names.values()), f"{where} channel, spatial, self_attention", (None,) * 3, "at least one member")
    expect(arrangement in ARRANGEMENTS, f"{where} arrangement", arrangement, f"one of {', '.join(ARRANGEMENTS)}")
    expect(order in permutations(PLACES), f"{where} order", order, f"the three of {', '.join(PLACES)}, in any order")
    expect(set(options) <= set(PLACES), f"{where} options", options, f"a dict with keys out of {', '.join(PLACES)}")


def example(draw):
    """A few members, one of each sort; tests/test_relations.py tries them all."""
    channel = draw.choice("channel", "squeeze_excitation", "efficient_channel", "simam")
    spatial = draw.choice("spatial", "cbam_spatial", None)
    self_attention = draw.choice("self_attention", "position", "channel_self")
    c, rng = draw.size("C", low=2), draw.rng
    start = {
        "squeeze_excitation": squeeze_excitation.init(rng, c, reduction=1),
        "efficient_channel": efficient_channel.init(rng, c, kernel=3),
        "cbam_spatial": cbam_spatial.init(rng, kernel=3, norm=False),
        "position": position.init(rng, c),
        "channel_self": channel_self.init(rng),
    }
    params = draw.like(Params(start.get(channel), start.get(spatial), start[self_attention]))
    if self_attention == "position":  # its key bias has no gradient: no law can notice a fault in 0
        key = params.self_attention.key._replace(bias=None)
        params = params._replace(self_attention=params.self_attention._replace(key=key))
    options = {
        "arrangement": draw.choice("arrangement", *ARRANGEMENTS),
        "order": draw.choice("order", PLACES, PLACES[::-1], (*PLACES[1:], PLACES[0])),
        "options": draw.choice("options", None, {"spatial": {"maps": ("avg", "max")}} if spatial else {}),
    }
    names = {"channel": channel, "spatial": spatial, "self_attention": self_attention}
    x = draw.array(draw.size("N", high=2), c, draw.size("H", low=2, high=3), draw.size("W", high=3))
    return Call((x, params), {**names, **options})


ABOUT = About(witnesses=("relation",))
