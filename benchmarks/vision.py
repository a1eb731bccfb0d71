"""Vision layers and attention, forward plus backward, beside the same computation in torch.

    python -m benchmarks.vision [--json FILE] [--rounds 3] [name ...]

Both sides compute in float64 on the CPU, from the same numbers, with the threads each takes by itself, and must agree
before they are timed. A round runs ours several times in a row, then torch, with a pause between: threads of one
library that wait for more work would otherwise steal time from the other. The table shows medians over all runs but
the first in a row. At the start a large array is made and freed: after that the C library keeps freed memory for the
next array, as in any long-running program, and no row is judged on the making of fresh pages.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from refattn.attention.channel import (
    channel_self,
    efficient_channel,
    second_order_channel,
    selective_kernel,
    simam,
    split_attention,
    squeeze_excitation,
)
from refattn.attention.mixed import bam, cbam, dual
from refattn.attention.spatial import (
    context_feature_extraction,
    non_local,
    position,
    pyramid_channel,
    pyramid_spatial,
)
from refattn.core import leaves, tree_map
from refattn.primitives import average_pool, batch_norm, bilinear_resize, conv, max_pool

N, C, H, W = 4, 64, 56, 56


class Row(NamedTuple):
    name: str
    module: ModuleType
    args: tuple  # the positional arguments of forward
    options: dict
    torch: Callable  # the same function of the same arguments, with tensors for leaves


def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, C, H, W))
    yield Row(
        "conv 3x3",
        *(conv, (x, conv.init(rng, C, C, (3, 3))), {"padding": 1}),
        lambda x, p: F.conv2d(x, *p, padding=1),
    )
    yield Row("conv 1x1", conv, (x, conv.init(rng, C, C, (1, 1))), {}, lambda x, p: F.conv2d(x, *p))
    yield Row(
        "conv 3x3 depthwise",
        *(conv, (x, conv.init(rng, C, C, (3, 3), groups=C)), {"padding": 1, "groups": C}),
        lambda x, p: F.conv2d(x, *p, padding=1, groups=C),
    )
    yield Row(
        "batch norm, training",
        *(batch_norm, (x, batch_norm.init(rng, C)), {}),
        lambda x, p: F.batch_norm(x, None, None, *p, training=True),
    )
    yield Row(
        "max pool 3x3 / 2",
        *(max_pool, (x,), {"kernel": 3, "stride": 2, "padding": 1}),
        lambda x: F.max_pool2d(x, 3, 2, 1),
    )
    yield Row("max pool 2x2 / 2", max_pool, (x,), {"kernel": 2}, lambda x: F.max_pool2d(x, 2))
    yield Row(
        "average pool 3x3 / 2",
        *(average_pool, (x,), {"kernel": 3, "stride": 2, "padding": 1}),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
    )
    yield Row("average pool 2x2 / 2", average_pool, (x,), {"kernel": 2}, lambda x: F.avg_pool2d(x, 2))
    yield Row(
        "bilinear resize x2",
        *(bilinear_resize, (x,), {"size": (2 * H, 2 * W), "align_corners": True}),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    )
    yield from channel_rows(rng, x)
    yield from spatial_rows(rng, x)


def channel_rows(rng, x):
    yield Row("squeeze-excitation", squeeze_excitation, (x, squeeze_excitation.init(rng, C)), {}, torch_excite)
    yield Row("efficient channel", efficient_channel, (x, efficient_channel.init(rng, C)), {}, torch_efficient_channel)
    yield Row("simam", simam, (x,), {}, torch_simam)
    yield Row("second-order channel", second_order_channel, (x, second_order_channel.init(rng, C)), {}, torch_soca)
    yield Row("selective kernel", selective_kernel, (x, selective_kernel.init(rng, C, C)), {}, torch_selective_kernel)
    yield Row(
        "split attention",
        *(split_attention, (x, split_attention.init(rng, C, C)), {"padding": 1}),
        torch_split_attention,
    )


def torch_excite(x, p, squeeze=lambda x: x.mean((2, 3))):
    gate = torch.sigmoid(F.linear(F.relu(F.linear(squeeze(x), p.w1, p.b1)), p.w2, p.b2))
    return x * gate[:, :, None, None]


def torch_efficient_channel(x, p):
    e = F.conv1d(x.mean((2, 3))[:, None], p.weight[:, None], padding=p.weight.shape[1] // 2)
    return x * torch.sigmoid(e)[:, 0, :, None, None]


def torch_simam(x):
    squares = (x - x.mean((2, 3), keepdim=True)).square()
    v = squares.sum((2, 3), keepdim=True) / (H * W - 1)
    return x * torch.sigmoid(squares / (4 * (v + 1e-4)) + 0.5)


def torch_soca(x, p):
    def squeeze(x):
        d = x.flatten(2)
        d = d - d.mean(2, keepdim=True)
        s = d @ d.mT / (H * W)
        trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        identity = torch.eye(C, dtype=x.dtype)
        y, z = s / trace, identity
        for _ in range(5):
            t = (3 * identity - z @ y) / 2
            y, z = y @ t, t @ z
        return (trace.sqrt() * y).mean(1)

    return torch_excite(x, p, squeeze)


def torch_block(x, kernel, norm, **geometry):
    a = F.conv2d(x, *kernel, **geometry) if geometry else F.linear(x, *kernel)
    return F.relu(F.batch_norm(a, None, None, *norm, training=True))


def torch_selective_kernel(x, p):
    maps = [torch_block(x, *branch, padding=m, dilation=m, groups=32) for m, branch in enumerate(p.branches, 1)]
    q = torch_block(sum(maps).mean((2, 3)), *p.squeeze)
    attention = F.linear(q, *p.select).reshape(N, len(maps), C, 1, 1).softmax(1)
    return (attention * torch.stack(maps, 1)).sum(1)


def torch_split_attention(x, p):
    splits = torch_block(x, p.conv, p.norm0, padding=1, groups=2).reshape(N, 2, C, H, W)
    h = torch_block(splits.sum(1).mean((2, 3)), p.fc1, p.norm1)
    attention = F.linear(h, *p.fc2).reshape(N, 2, C, 1, 1).softmax(1)
    return (attention * splits).sum(1)


def spatial_rows(rng, x):
    small = rng.normal(size=(N, C, H // 2, W // 2))  # a map of all pixels by all pixels is sixteen times smaller
    yield Row("cbam", cbam, (x, lively(cbam.init(rng, C))), {}, torch_cbam)
    yield Row("bam", bam, (x, lively(bam.init(rng, C))), {}, torch_bam)
    yield Row("non-local", non_local, (x, lively(non_local.init(rng, C))), {}, torch_non_local)
    yield Row("position, 28x28", position, (small, lively(position.init(rng, C))), {}, torch_position)
    yield Row("channel self", channel_self, (x, lively(channel_self.init(rng))), {}, torch_channel_self)
    yield Row("dual head, 28x28", dual, (small, lively(dual.init(rng, C, 19))), {}, torch_dual)
    context = context_feature_extraction.init(rng, C)
    yield Row("PFANet context", context_feature_extraction, (x, context), {}, torch_context)
    yield Row("PFANet channel", pyramid_channel, (x, squeeze_excitation.init(rng, C, 4)), {}, torch_excite)
    yield Row("PFANet spatial", pyramid_spatial, (x, pyramid_spatial.init(rng, C)), {}, torch_pyramid_spatial)


def lively(params):
    """`params` with 0.1 for what starts at 0: a block that starts as the identity would hide a wrong gradient."""
    return tree_map(lambda a: a if a.any() else a + 0.1, params)


def torch_cbam(x, p):
    z = torch.stack([x.mean((2, 3)), x.flatten(2).max(2)[0]])
    h = F.relu(F.linear(z, p.channel.w1, p.channel.b1))
    x = x * torch.sigmoid(F.linear(h, p.channel.w2, p.channel.b2).sum(0))[:, :, None, None]
    f = F.conv2d(torch.stack([x.max(1)[0], x.mean(1)], 1), p.spatial.weight, padding=3)
    return x * torch.sigmoid(F.batch_norm(f, None, None, *p.spatial.norm, training=True))


def torch_bam(x, p):
    c = x.mean((2, 3))
    for layer in p.channel.hidden:
        c = torch_block(c, *layer)
    c = F.linear(c, *p.channel.final)[:, :, None, None]
    f = torch_block(x, *p.spatial.reduce, padding=0)
    for block in p.spatial.dilated:
        f = torch_block(f, *block, padding=4, dilation=4)
    return x * (1 + torch.sigmoid(c * F.conv2d(f, *p.spatial.final)))


def torch_non_local(x, p):
    rows, keys = x.flatten(2).mT, F.max_pool2d(x, 2).flatten(2).mT
    theta, phi, g = F.linear(rows, *p.theta), F.linear(keys, *p.phi), F.linear(keys, *p.g)
    weights = (theta @ phi.mT / theta.shape[2] ** 0.5).softmax(2)
    change = F.linear(weights @ g, *p.out).mT.reshape(x.shape)
    return x + F.batch_norm(change, None, None, *p.norm, training=True)


def torch_position(x, p):
    rows = x.flatten(2).mT
    weights = (F.linear(rows, *p.query) @ F.linear(rows, *p.key).mT).softmax(2)
    return x + p.gamma * (weights @ F.linear(rows, *p.value)).mT.reshape(x.shape)


def torch_channel_self(x, p):
    flat = x.flatten(2)
    return x + p.gamma * ((-flat @ flat.mT).softmax(2) @ flat).reshape(x.shape)


def torch_dual(x, p):
    attended = torch_position(torch_block(x, *p.position_in, padding=1), p.position)
    mixed = torch_channel_self(torch_block(x, *p.channel_in, padding=1), p.channel)
    a, b = torch_block(attended, *p.position_out, padding=1), torch_block(mixed, *p.channel_out, padding=1)
    outs = F.conv2d(a + b, *p.classify_both), F.conv2d(a, *p.classify_position), F.conv2d(b, *p.classify_channel)
    return dual.Out(*outs)


def torch_context(x, p):
    dilations = 0, 3, 5, 7  # padding and dilation; the first kernel is one pixel
    maps = [F.conv2d(x, *branch, padding=d, dilation=max(d, 1)) for d, branch in zip(dilations, p.branches)]
    return F.relu(F.batch_norm(torch.cat(maps, 1), None, None, *p.norm, training=True, eps=1e-3))


def torch_pyramid_spatial(x, p):
    def unit(x, layer):
        a = F.conv2d(x, *layer.conv, padding="same")
        return F.relu(F.batch_norm(a, None, None, *layer.norm, training=True, eps=1e-3))

    chains = [unit(unit(x, chain.first), chain.second) for chain in p]
    return torch.sigmoid(sum(chains)).expand_as(x)


def ours(row, dout):
    out, saved = row.module.forward(*row.args, **row.options)
    return out, row.module.backward(dout, saved)


def theirs(row, args, dout):
    out = row.torch(*args)
    tensors = [t for _, t in leaves(args)]
    return out, torch.autograd.grad([t for _, t in leaves(out)], tensors, [t for _, t in leaves(dout)])


def measure(row, rounds):
    """Medians in milliseconds: (ours, torch's)."""
    args = tree_map(lambda a: torch.tensor(a, requires_grad=True), row.args)
    rng = np.random.default_rng(1)
    dout = tree_map(lambda y: rng.normal(size=y.shape), row.module.forward(*row.args, **row.options)[0])
    tensors = tree_map(torch.tensor, dout)
    agree(row, ours(row, dout), theirs(row, args, tensors))
    mine, other = [], []
    for _ in range(rounds):
        mine += clock(lambda: ours(row, dout))
        other += clock(lambda: theirs(row, args, tensors))
    return 1e3 * statistics.median(mine), 1e3 * statistics.median(other)


def agree(row, mine, other):
    (out, grads), (their_out, their_grads) = mine, other
    pairs = [*zip(leaves(out), leaves(their_out)), *zip(leaves(tuple(grads)), leaves(tuple(their_grads)))]
    for (path, a), (_, b) in pairs:
        worst, size = np.abs(a - b.detach().numpy()).max(), np.abs(a).max()
        assert worst <= 1e-10 * (1 + size), f"{row.name}: {path or 'out'} differs from torch's by {worst:.3g}"


def clock(function, runs=8):
    """The seconds of all runs but the first, which finds cold caches."""
    time.sleep(0.3)  # the other library's threads spin for up to 0.2 s
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="rows whose name contains one of these; all of them unless given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the table to this file as well")
    given = parser.parse_args()
    np.empty(2**25 - 2**16, np.uint8)  # made and freed: see above
    print(f"forward + backward, float64, N={N} C={C} {H}x{W}; numpy {np.__version__}, torch {torch.__version__}")
    print(f"{'':24}{'ours, ms':>10}{'torch, ms':>10}{'ratio':>8}")
    table = []
    for row in rows():
        if given.names and not any(name in row.name for name in given.names):
            continue
        mine, other = measure(row, given.rounds)
        print(f"{row.name:24}{mine:10.2f}{other:10.2f}{mine / other:8.2f}", flush=True)
        table.append({"name": row.name, "ours_ms": mine, "torch_ms": other, "ratio": mine / other})
    if given.json:
        setting = {"shape": [N, C, H, W], "threads": torch.get_num_threads(), "python": platform.python_version()}
        setting |= {"numpy": np.__version__, "torch": torch.__version__}
        with open(given.json, "w") as file:
            json.dump({**setting, "rows": table}, file, indent=1)


if __name__ == "__main__":
    main()
