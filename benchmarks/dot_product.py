"""Dot-product attention in float64: time and peak memory of the plain file, the streaming one and the frameworks.

    python -m benchmarks.dot_product [--json FILE] [--rounds 3] [--no-memory] [--long]

For every shape: the time of forward plus backward in milliseconds (the ONNX evaluator has only a forward), on all
cores, medians of runs that take turns, and the floor: the six matrix products alone that both passes need, of whole
matrices; and the peak of memory beyond inputs, each in a process of its own. Install threadpoolctl: without it
streaming has one thread. --long adds the memory at L = 16384 and the spot check of a million tokens.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from refattn.attention.dot_product import dot_product_attention, streaming

SHAPES = [(1, 8, 2048, 64, False), (1, 8, 2048, 64, True), (1, 4, 4096, 128, False), (1, 4, 4096, 128, True)]


def inputs(batch, heads, length, features, seed=0):
    return np.random.default_rng(seed).normal(size=(4, batch, heads, length, features))


def plain(q, k, v, dy, causal):
    y, saved = dot_product_attention.forward(q, k, v, is_causal=causal)
    return y, *dot_product_attention.backward(dy, saved)[:3]


def stream(q, k, v, dy, causal):
    y, grads = streaming.forward_backward(q, k, v, dout=dy, is_causal=causal)
    return y, *grads[:3]


def stream_in_two(q, k, v, dy, causal):
    y, saved = streaming.forward(q, k, v, is_causal=causal)
    return y, *streaming.backward(dy, saved)[:3]


def floor(q, k, v, dy, causal):
    """The six products, heads one after the other, each as fast as NumPy can; a causal one could skip half of it."""
    for at in np.ndindex(q.shape[:2]):
        p, dp = q[at] @ k[at].T, dy[at] @ v[at].T
        p @ v[at], p.T @ dy[at], dp @ k[at], dp.T @ q[at]


def torch_sdpa(q, k, v, dy, causal):
    import torch

    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    return [x.numpy() for x in (y.detach(), *torch.autograd.grad(y, tensors, torch.from_numpy(dy)))]


def torch_written_out(q, k, v, dy, causal):
    import torch

    tensors = tq, tk, tv = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    scores = tq @ tk.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=bool).tril(), -math.inf)
    y = scores.softmax(-1) @ tv
    return [x.numpy() for x in (y.detach(), *torch.autograd.grad(y, tensors, torch.from_numpy(dy)))]


def jax_xla(q, k, v, dy, causal):
    """Written out, as jax.nn.dot_product_attention takes its softmax in float32."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    y, grads = _jax_step(jax, jnp)(q, k, v, dy, causal)
    return [np.asarray(x) for x in (y, *grads)]


_JAX = {}


def _jax_step(jax, jnp):
    def step(q, k, v, dy, causal):
        def attend(q, k, v):
            scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
            if causal:
                scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
            return jax.nn.softmax(scores, axis=-1) @ v

        y, pull_back = jax.vjp(attend, q, k, v)
        return y, pull_back(dy)

    return _JAX.setdefault("step", jax.jit(step, static_argnums=4))


def onnx_evaluator(q, k, v, dy, causal):
    import onnx
    from onnx.reference import ReferenceEvaluator

    def model():
        double, helper = onnx.TensorProto.DOUBLE, onnx.helper
        node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(causal))
        ins = [helper.make_tensor_value_info(name, double, [None] * 4) for name in "qkv"]
        graph = helper.make_graph([node], "g", ins, [helper.make_tensor_value_info("y", double, [None] * 4)])
        return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))

    return _JAX.setdefault("onnx", {}).setdefault(causal, model()).run(None, {"q": q, "k": k, "v": v})


RUNNERS = {
    "plain": (plain, None),
    "streaming": (stream, None),
    "streaming in two": (stream_in_two, None),
    "floor": (floor, None),
    "torch SDPA": (torch_sdpa, "torch"),
    "torch written out": (torch_written_out, "torch"),
    "JAX": (jax_xla, "jax"),
    "ONNX evaluator, forward": (onnx_evaluator, "onnx"),
}


def available():
    for name, (run, package) in RUNNERS.items():
        if package is None or importlib.util.find_spec(package):
            yield name, run


def agree(name, expected, got):
    for a, b in zip(expected, got or ()):
        worst = np.abs(a - b).max()
        assert worst <= 1e-11 * (1 + np.abs(a).max()), f"{name} differs by {worst:.3g}"


def measure(shape, rounds):
    """{name: median seconds}."""
    *sizes, causal = shape
    arrays = inputs(*sizes)
    expected = plain(*arrays, causal)
    times = {}
    for name, run in available():
        agree(name, expected, run(*arrays, causal))
    for _ in range(rounds):
        for name, run in available():
            time.sleep(0.3)  # another library's threads spin for up to 0.2 s
            for again in (False, True):
                start = time.perf_counter()
                run(*arrays, causal)
                if again:
                    times.setdefault(name, []).append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def table(rounds, with_memory):
    rows = []
    for shape in SHAPES:
        *sizes, causal = shape
        print(f"\n(B, H, L, D) = {tuple(sizes)}, {'causal' if causal else 'not causal'}")
        found = measure(shape, rounds)
        goal = max(found["floor"], found.get("torch SDPA", 0))
        memory = {name: peak(name, shape) for name in found if with_memory}
        for name, seconds in found.items():
            mib = f"{memory[name]:10.0f} MiB" if with_memory else ""
            print(f"  {name:26}{1e3 * seconds:10.1f} ms{seconds / goal:8.2f} of the goal{mib}", flush=True)
        rows.append({"shape": shape, "seconds": found, "MiB": memory, "ratio": found["streaming"] / goal})
    print("\nThe goal is the larger of torch SDPA and the floor.")
    return rows


def apart(expression):
    """Its value, found by a fresh process, whose peak of memory is its own."""
    script = f"import json; from benchmarks import dot_product as d; print(json.dumps(d.{expression}))"
    return json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def peak(name, shape):
    """MiB that one run takes beyond its inputs."""
    return apart(f"own_peak({name!r}, {shape!r})")


def own_peak(name, shape):
    *sizes, causal = shape
    run = RUNNERS[name][0]
    run(*inputs(1, 1, 64, sizes[-1]), causal)  # imports are not counted
    arrays = inputs(*sizes)
    before = highest()
    run(*arrays, causal)
    return highest() - before


def highest():
    """The most memory that this process has held, in MiB."""
    status = pathlib.Path("/proc/self/status")  # on Linux, ru_maxrss begins with what the parent held
    if status.exists():
        return int(next(line.split()[1] for line in status.open() if line.startswith("VmHWM"))) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_at(length=16384):
    """The streaming file where the plain one would need gigabytes: one head, 64 features."""
    short = length // 4
    plain, streamed = peak("plain", (1, 1, short, 64, False)) * 16, peak("streaming", (1, 1, length, 64, False))
    results = 4 * length * 64 / 2**17
    print(f"\nL = {length}, one head, D = 64, MiB beyond inputs, of which y and the gradients are {results:.0f}:")
    print(f"  plain {plain:.0f}, 16 times that at {short}; streaming {streamed:.0f}, {100 * streamed / plain:.2f} %")
    return {"plain": plain, "streaming": streamed}


def spot_check(length=1_000_000, period=1000, samples=64):
    """Chosen rows and columns of a sequence of `length`, with keys that repeat, so that the whole answer is known.

    n equal keys share what one of them would have: y is the same, lse is log n more, dk and dv are 1/n of it.
    """
    rng, times = np.random.default_rng(0), length // period
    q, dy = rng.normal(size=(2, 1, 1, length, 64))
    few_k, few_v = rng.normal(size=(2, 1, 1, period, 64))
    y, lse = np.empty_like(q), np.empty((1, 1, length))
    dk, dv = np.zeros_like(few_k), np.zeros_like(few_v)
    dq = {}
    chosen = np.sort(rng.choice(length, samples, replace=False))
    for start in range(0, length, 10_000):
        some = slice(start, start + 10_000)
        out, grads = streaming.forward_backward(
            q[:, :, some], few_k, few_v, dout=streaming.Out(dy[:, :, some], np.zeros((1, 1, 10_000))), return_lse=True
        )
        y[:, :, some], lse[:, :, some] = out.y, out.lse + math.log(times)
        dk += grads[1] / times
        dv += grads[2] / times
        dq |= {i: grads[0][0, 0, i - start] for i in chosen if start <= i < start + 10_000}
    k, v = np.tile(few_k, (1, 1, times, 1)), np.tile(few_v, (1, 1, times, 1))
    start = time.perf_counter()
    found = streaming.sampled(q, k, v, dout=dy, rows=chosen, columns=chosen, y=y, lse=lse)
    seconds, gib = time.perf_counter() - start, highest() / 2**10
    expected = y[:, :, chosen], np.stack([dq[i] for i in chosen]), dk[:, :, chosen % period], dv[:, :, chosen % period]
    agree("sampled", expected, (found.y, found.dq[0, 0], found.dk, found.dv))
    return {"length": length, "samples": samples, "seconds": seconds, "peak GiB": gib}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--json", help="write the tables to this file as well")
    given = parser.parse_args()
    results = {"shapes": table(given.rounds, not given.no_memory)}
    if given.long:
        results |= {"memory": memory_at(), "long": (found := apart("spot_check()"))}
        print("\n{samples} rows and columns of L = {length}, D = 64:".format(**found), end=" ")
        print("{seconds:.1f} s, peak {peak GiB:.2f} GiB with inputs".format(**found))
    if given.json:
        with open(given.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
