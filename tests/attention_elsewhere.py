"""The attention functions of frameworks, called as dot_product_attention is: what an adapter of each has to do.

Every function takes (args, options, dy) of NumPy arrays, heads first, and returns (y, lse or None, gradients or None);
the gradients are those of q, k, v and of attn_bias if there is one. Frameworks are imported inside.
"""

import numpy as np


def queries_keys(args):
    return args[0].shape[2], args[1].shape[2]


def both(args, options, allowed=True):
    """attn_mask and causality, for frameworks that take one of the two: an array of bool for every score, or None."""
    queries, keys = queries_keys(args)
    if options.get("attn_mask") is None and allowed is True:
        return None
    mask = True if options.get("attn_mask") is None else options["attn_mask"]
    return np.broadcast_to(mask & np.asarray(allowed), (*args[0].shape[:2], queries, keys))


def lower(args, diagonal=0):
    return np.tri(*queries_keys(args), diagonal, dtype=bool)


def one_mask(args, options, causal, forbidden=-np.inf):
    """What frameworks with a single mask get: an array of bool, or of numbers that are added, or None."""
    mask, bias = both(args, options, causal), args[3]
    if bias is None or mask is None:
        return (
            mask
            if bias is None
            else np.ascontiguousarray(np.broadcast_to(bias, (*args[0].shape[:3], len(args[1][0, 0]))))
        )
    return np.where(mask, bias, np.array(forbidden, bias.dtype))


# --- PyTorch --------------------------------------------------------------------------------------------------


def torch_tensors(args, dy):
    import torch

    return [None if x is None else torch.from_numpy(x.copy()).requires_grad_(dy is not None) for x in args]


def torch_result(y, tensors, dy, lse=None):
    import torch

    if dy is None:
        return y.detach().numpy(), lse, None
    inputs = [x for x in tensors if x is not None]
    grads = torch.autograd.grad(y, inputs, torch.from_numpy(dy), allow_unused=True)
    return y.detach().numpy(), lse, [np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(inputs, grads)]


def torch_mask(args, options, tensors, causal):
    """A mask for torch, through which the gradient of attn_bias finds its way."""
    import torch

    mask, bias = both(args, options, causal), tensors[3]
    mask = None if mask is None else torch.from_numpy(mask.copy())
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias + torch.where(mask, torch.zeros((), dtype=bias.dtype), -torch.inf)


def torch_sdpa(args, options, dy):
    import torch

    tensors, causal = torch_tensors(args, dy), options.get("is_causal", False)
    given = torch_mask(args, options, tensors, True)
    if causal and given is not None:
        given, causal = torch_mask(args, options, tensors, lower(args)), False
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = torch.nn.functional.scaled_dot_product_attention(
            *tensors[:3], given, is_causal=causal, scale=options.get("scale"), enable_gqa=True
        )
    return torch_result(y, tensors, dy)


def torch_flex(args, options, dy):
    import torch
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    q, k, v, bias, _ = torch_tensors(args, None)
    (left, right), softcap = options.get("window") or (None, None), options.get("softcap")
    mask = options.get("attn_mask")
    mask = None if mask is None else torch.from_numpy(np.broadcast_to(mask, (*q.shape[:3], k.shape[2])).copy())
    bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])

    def mask_mod(b, h, i, j):
        keep = i >= i
        if mask is not None:
            keep = keep & mask[b, h, i, j]
        if options.get("is_causal"):
            keep = keep & (j <= i)
        if left is not None:
            keep = keep & (j >= i - left)
        return keep if right is None else keep & (j <= i + right)

    def score_mod(score, b, h, i, j):
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[b, h, i, j]

    hidden = mask is not None or options.get("is_causal") or options.get("window")
    block = create_block_mask(mask_mod, *q.shape[:3], k.shape[2], device="cpu") if hidden else None
    more = {"scale": options.get("scale"), "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
    y, aux = flex_attention(q, k, v, score_mod=score_mod, block_mask=block, **more)
    return y.numpy(), aux.lse.numpy(), None


def torch_mha(args, options, dy, need_weights=False):
    """nn.MultiheadAttention whose projections do nothing."""
    import torch

    tensors = torch_tensors(args, dy)
    batch, heads, _, features = args[0].shape
    same = torch.eye(heads * features, dtype=tensors[0].dtype)
    q, k, v = (x.permute(2, 0, 1, 3).flatten(2) for x in tensors[:3])  # (length, batch, all features)
    given = torch_mask(args, options, tensors, lower(args) if options.get("is_causal") else True)
    if given is not None:
        given = given.expand(batch, heads, len(q), len(k)).flatten(0, 1)
        given = ~given if given.dtype == torch.bool else given
    y, _ = torch.nn.functional.multi_head_attention_forward(
        *(q, k, v, heads * features, heads, same.repeat(3, 1), None, None, None, False, 0.0, same, None),
        need_weights=need_weights,
        attn_mask=given,
    )
    return torch_result(y.unflatten(-1, (heads, features)).permute(1, 2, 0, 3), tensors, dy)


def torch_mha_weights(args, options, dy):
    return torch_mha(args, options, dy, need_weights=True)


def hf_eager(args, options, dy):
    """The function of gpt-oss where there are sinks, of Llama where not."""
    from types import SimpleNamespace

    import torch
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.llama import modeling_llama

    tensors = torch_tensors(args, dy)
    q, k, v, bias, sinks = tensors
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, sinks=sinks)
    mask = both(args, options, lower(args) if options.get("is_causal") else True)
    if mask is not None:
        lowest = torch.finfo(q.dtype).min
        mask = torch.where(torch.from_numpy(mask.copy()), torch.zeros((), dtype=q.dtype), lowest)
        bias = mask if bias is None else bias + mask
    family = modeling_llama if sinks is None else modeling_gpt_oss
    scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    y, _ = family.eager_attention_forward(module, q, k, v, bias, scaling=scale, dropout=0.0)
    return torch_result(y.transpose(1, 2), tensors, dy)


# --- JAX, Flax ------------------------------------------------------------------------------------------------


def jax_result(function, args, dy):
    """`function` of the arrays that are there, which returns (y, lse)."""
    import jax

    jax.config.update("jax_enable_x64", True)
    arrays = [jax.numpy.asarray(x) for x in args if x is not None]
    y, back, lse = jax.vjp(function, *arrays, has_aux=True)
    grads = None if dy is None else [np.asarray(g) for g in back(jax.numpy.asarray(dy))]
    return np.asarray(y), None if lse is None else np.asarray(lse), grads


def jax(args, options, dy):
    from jax.nn import dot_product_attention

    mask = options.get("attn_mask")
    mask = None if mask is None else np.broadcast_to(mask, (*args[0].shape[:3], args[1].shape[2]))
    names = {"scale": "scale", "is_causal": "is_causal", "window": "local_window_size"}
    names |= {"q_seqlens": "query_seq_lengths", "kv_seqlens": "key_value_seq_lengths"}
    more = {theirs: options[ours] for ours, theirs in names.items() if options.get(ours) is not None}

    def function(q, k, v, bias=None):
        if bias is not None and bias.ndim < 4:
            bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        arrays = (x.swapaxes(1, 2) for x in (q, k, v))
        y, lse = dot_product_attention(*arrays, bias, mask, return_residual=True, **more)
        return y.swapaxes(1, 2), None if "query_seq_lengths" in more else lse.swapaxes(1, 2)  # of padding: any number

    return jax_result(function, args, dy)


def flax(args, options, dy):
    from flax.linen import dot_product_attention

    mask = both(args, options, lower(args) if options.get("is_causal") else True)

    def function(q, k, v, bias=None):
        return dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), bias, mask).swapaxes(1, 2), None

    return jax_result(function, args, dy)


# --- Keras ----------------------------------------------------------------------------------------------------


def keras_ops(args, options, dy):
    from keras import ops

    q, k, v = (x.swapaxes(1, 2) for x in args[:3])
    more = {"scale": options.get("scale"), "is_causal": bool(options.get("is_causal"))}
    y = ops.dot_product_attention(q, k, v, bias=args[3], mask=both(args, options), **more)
    return ops.convert_to_numpy(y).swapaxes(1, 2), None, None


def keras_mha(args, options, dy, scores=False):
    """layers.MultiHeadAttention whose projections do nothing. Its mask is the same for all heads."""
    from keras import layers, ops

    batch, heads, queries, features = args[0].shape
    window = options.get("window")
    sliding = {} if window is None else {"sliding_window": window[0] + 1}
    layer = layers.MultiHeadAttention(heads, features, use_bias=False, dtype=str(args[0].dtype), **sliding)
    q, k, v = (x.swapaxes(1, 2).reshape(batch, -1, heads * features) for x in args[:3])
    layer.build(q.shape, v.shape, k.shape)
    same = np.eye(heads * features)
    layer.set_weights([same.reshape(x.shape) for x in layer.get_weights()])
    mask = options.get("attn_mask")
    mask = None if mask is None else np.broadcast_to(mask, (batch, 1, queries, k.shape[1]))[:, 0].copy()
    more = {"use_causal_mask": bool(options.get("is_causal")), "return_attention_scores": scores}
    y = layer(*(ops.convert_to_tensor(x) for x in (q, v, k)), attention_mask=mask, **more)
    y = ops.convert_to_numpy(y[0] if scores else y)
    return y.reshape(batch, queries, heads, features).swapaxes(1, 2), None, None


def keras_mha_scores(args, options, dy):
    return keras_mha(args, options, dy, scores=True)


def keras_attention(args, options, dy):
    """layers.Attention has no heads, and a mask of keys alone."""
    from keras import layers, ops

    batch, heads, _, _ = args[0].shape
    q, k, v = (x.reshape(batch * heads, *x.shape[2:]) for x in args[:3])
    mask = options.get("attn_mask")
    mask = None if mask is None else np.broadcast_to(mask, (batch, heads, 1, k.shape[1])).reshape(batch * heads, -1)
    tensors = [ops.convert_to_tensor(x) for x in (q, v, k)]
    masks = None if mask is None else [None, ops.convert_to_tensor(mask)]
    y = layers.Attention(dtype=str(q.dtype))(tensors, mask=masks, use_causal_mask=bool(options.get("is_causal")))
    return ops.convert_to_numpy(y).reshape(args[0].shape), None, None


# --- ONNX, ONNX Runtime ---------------------------------------------------------------------------------------


def onnx_model(op, inputs, attributes, opset, domain="", outputs=1):
    """A model of one node; `inputs` by name, of which some are None."""
    from onnx import helper

    tensors = {name: x for name, x in inputs.items() if x is not None}
    names = [name if name in tensors else "" for name in inputs]
    node = helper.make_node(op, names, [f"y{n}" for n in range(outputs)], domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in tensors.items()
    ]
    kind = helper.np_dtype_to_tensor_dtype(args_dtype(tensors))
    outs = [helper.make_tensor_value_info(f"y{n}", kind, None) for n in range(outputs)]
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([node], "one", infos, outs)
    return helper.make_model(graph, opset_imports=imports, ir_version=11), tensors


def args_dtype(tensors):
    return next(iter(tensors.values())).dtype


def onnx_attention(args, options, opset):
    q, k, v, _, _ = args
    window = options.get("window") or (None, None)
    attributes = {"scale": options.get("scale"), "softcap": options.get("softcap")}
    attributes |= {"is_causal": int(bool(options.get("is_causal")))}
    if opset >= 25:
        attributes |= dict(zip(("left_window_size", "right_window_size"), window))
    attributes = {name: value for name, value in attributes.items() if value is not None}
    inputs = {"q": q, "k": k, "v": v, "mask": one_mask(args, options, True)}
    return onnx_model("Attention", inputs, attributes, opset)


def onnx_reference(opset):
    def run(args, options, dy):
        from onnx.reference import ReferenceEvaluator

        model, tensors = onnx_attention(args, options, opset)
        return ReferenceEvaluator(model).run(None, tensors)[0], None, None

    return run


def ort_run(model, tensors):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.ascontiguousarray(x) for name, x in tensors.items()})[0]


def ort_attention(opset):
    def run(args, options, dy):
        return ort_run(*onnx_attention(args, options, opset)), None, None

    return run


def packed(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def unpacked(y, like):
    return y.reshape(like.shape[0], like.shape[2], like.shape[1], like.shape[3]).swapaxes(1, 2)


def ort_mha(args, options, dy):
    q, k, v, _, _ = args
    mask = one_mask(args, options, True)
    if mask is not None and mask.dtype == bool:
        mask = np.where(mask, 0, -np.inf).astype(q.dtype)
    inputs = {"q": packed(q), "k": packed(k), "v": packed(v), "bias": None, "kpm": None, "attention_bias": mask}
    attributes = {"num_heads": q.shape[1], "unidirectional": int(bool(options.get("is_causal")))}
    attributes |= {} if options.get("scale") is None else {"scale": options["scale"]}
    model, tensors = onnx_model("MultiHeadAttention", inputs, attributes, 21, "com.microsoft")
    return unpacked(ort_run(model, tensors), q), None, None


def ort_gqa(args, options, dy):
    """One item after the other. Keys before those of the queries are the cache; it may be longer than what is in it."""
    q, k, v, _, sinks = args
    (batch, heads, queries, _), keys, window = q.shape, k.shape[2], options.get("window")
    lengths = options.get("kv_seqlens", np.full(batch, keys))
    attributes = {"num_heads": heads, "kv_num_heads": k.shape[1]}
    attributes |= {} if window is None else {"local_window_size": window[0] + 1}
    attributes |= {name: options[name] for name in ("scale", "softcap") if options.get(name) is not None}
    items = []
    for b, length in enumerate(lengths):
        new, cache, one = slice(length - queries, length), slice(0, keys - queries), slice(b, b + 1)
        inputs = {"q": packed(q[one]), "k": packed(k[one, :, new]), "v": packed(v[one, :, new])}
        inputs |= {
            "past_k": k[one, :, cache],
            "past_v": v[one, :, cache],
            "seqlens_k": np.array([length - 1], np.int32),
        }
        inputs |= {"total": np.array([keys], np.int32), "cos": None, "sin": None, "position_ids": None}
        inputs |= {"attention_bias": None, "head_sink": sinks}
        items.append(ort_run(*onnx_model("GroupQueryAttention", inputs, attributes, 21, "com.microsoft", outputs=3)))
    return unpacked(np.concatenate(items), q), None, None


# --- others ---------------------------------------------------------------------------------------------------


def mlx(args, options, dy):
    import mlx.core as mx

    q, k, v, _, sinks = (None if x is None else mx.array(x) for x in args)
    scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    lowest = np.finfo(args[0].dtype).min  # which is what a mask of bool puts there
    mask = one_mask(args, options, True, lowest)
    if options.get("is_causal"):  # "causal", or a mask of one's own
        diagonal = k.shape[2] - q.shape[2]
        mask = "causal" if mask is None else one_mask(args, options, lower(args, diagonal), lowest)
    mask = mx.array(mask) if isinstance(mask, np.ndarray) else mask
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    return np.array(y), None, None


def openvino(args, options, dy):
    import openvino as ov
    import openvino.opset13 as ops

    mask = one_mask(args, options, lower(args) if options.get("is_causal") else True)
    if mask is not None:
        options = options | {"is_causal": False}  # or it would be dropped
    values = [x for x in (*args[:3], mask) if x is not None]
    parameters = [ops.parameter(x.shape, x.dtype.type) for x in values]
    inputs = dict(zip(("query", "key", "value", "attention_mask"), parameters))
    if options.get("scale") is not None:
        inputs["scale"] = ops.constant(np.array(options["scale"], args[0].dtype))
        if mask is None:
            inputs["attention_mask"] = ops.constant(np.zeros((1, 1, *queries_keys(args)), args[0].dtype))
    node = ops.scaled_dot_product_attention(**inputs, causal=bool(options.get("is_causal")))
    model = ov.compile_model(ov.Model([node], parameters), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model(values)[0], None, None


def paddle(args, options, dy):
    import paddle

    q, k, v = (paddle.to_tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in args[:3])
    mask, causal = one_mask(args, options, True), bool(options.get("is_causal"))
    if causal and mask is not None:  # which it would drop
        mask, causal = one_mask(args, options, lower(args)), False
    mask = None if mask is None else paddle.to_tensor(np.ascontiguousarray(mask))
    y = paddle.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return y.numpy().swapaxes(1, 2), None, None
