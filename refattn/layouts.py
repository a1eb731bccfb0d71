"""Parameters as other people keep them: to ours and back, so that gradients can be compared with theirs.

Arrays in and out: `{name: w.numpy() for name, w in module.state_dict().items()}`. What goes one way is a reshape, so
gradients go the same way as parameters.
"""

import numpy as np

from refattn.attention.dot_product import multi_head
from refattn.primitives import linear


def multi_head_from_torch(state):
    """multi_head.Params of the state_dict of nn.MultiheadAttention, packed in in_proj_weight or not.

    in_proj_weight is q, k and v one below the other, each all its heads. GPT-NeoX and Megatron have for each head its
    q, k and v: `w.reshape(heads, 3, -1, E).swapaxes(0, 1).reshape(-1, E)` is then in_proj_weight.
    """
    packed = state.get("in_proj_weight")
    three = [state[f"{name}_proj_weight"] for name in "qkv"] if packed is None else np.split(packed, 3)
    biases = np.split(state["in_proj_bias"], 3) if "in_proj_bias" in state else [None] * 3
    out = linear.Params(state["out_proj.weight"], state.get("out_proj.bias"))
    learned = (state[name].reshape(-1) for name in ("bias_k", "bias_v") if name in state)
    return multi_head.Params(*map(linear.Params, three, biases), out, *learned)


def multi_head_to_torch(params):
    """The state_dict of such parameters: packed where q, k and v have as many features, as torch does."""
    *three, out = params[:4]
    weights = [projection.weight for projection in three]
    if len({weight.shape for weight in weights}) == 1:
        state = {"in_proj_weight": np.concatenate(weights)}
    else:
        state = {f"{name}_proj_weight": weight for name, weight in zip("qkv", weights)}
    state["out_proj.weight"] = out.weight
    if out.bias is not None:
        state |= {"in_proj_bias": np.concatenate([projection.bias for projection in three]), "out_proj.bias": out.bias}
    if params.bias_k is not None:
        state |= {"bias_k": params.bias_k[None, None], "bias_v": params.bias_v[None, None]}
    return state


def multi_head_from_kernels(query, key, value, out):
    """multi_head.Params of what Keras and flax keep: four pairs (kernel, bias), the bias None where there is none.

    Kernels are (in, H, D) and biases (H, D), but those of `out` (H, D, O) and (O,).
    """
    three = (_from_kernel(k.reshape(len(k), -1), b) for k, b in (query, key, value))
    kernel, bias = out
    return multi_head.Params(*three, _from_kernel(kernel.reshape(-1, kernel.shape[-1]), bias))


def multi_head_to_kernels(params, heads):
    """The four pairs of such parameters."""
    *three, out = params[:4]
    pairs = ((w.T.reshape(w.shape[1], heads, -1), None if b is None else b.reshape(heads, -1)) for w, b in three)
    return *pairs, (out.weight.T.reshape(heads, -1, len(out.weight)), out.bias)


def _from_kernel(kernel, bias):
    return linear.Params(kernel.T, None if bias is None else bias.reshape(-1))
