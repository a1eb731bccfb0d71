"""ONNX's own node cases, as the installed `onnx` generates them: the reference gives the outputs they expect.

rtol and atol are those of the cases (1e-3 and 1e-7); float32 outputs are also held to FLOAT32 of their largest entry.
Not so bfloat16, of which 1e-3 is a quarter of u = 2^-8: the cases round to it after every operation (logits, their
exponentials, the sum, the quotient, ...) and so expect numbers that are off by a few u themselves; 4 u are allowed.
"""

import importlib.util
import warnings

import numpy as np
import pytest

from tests import attention_elsewhere as elsewhere
from tests import test_conventions as conventions
from tests.test_conventions import FLOAT32, same

pytestmark = pytest.mark.frameworks
COUNTS = {"Attention": 93, "LayerNormalization": 19, "RMSNormalization": 19, "RotaryEmbedding": 8, "Softmax": 7}


def cases():
    """Those of one node; the others (_expanded) are the same, with the body of the operator in its place."""
    if importlib.util.find_spec("onnx") is None:
        return [pytest.param(None, marks=pytest.mark.skip(reason="onnx is not installed: pip install 'refattn[onnx]'"))]
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():  # it makes the cases of all operators at once
        warnings.simplefilter("ignore")
        found = [(case, [node.op_type for node in case.model.graph.node]) for case in collect_testcases(None)]
    return [pytest.param(case, id=case.name) for case, nodes in found if len(nodes) == 1 and nodes[0] in COUNTS]


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_node(case):
    from onnx import helper

    from refattn.frameworks.onnx import OPERATORS

    (node,), opset = case.model.graph.node, case.model.opset_import[0].version
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for inputs, outputs in case.data_sets:
        given = iter(inputs)
        found = OPERATORS[node.op_type](
            *(next(given) if name else None for name in node.input), **attributes, opset=opset
        )
        wanted = [(y, name) for y, name in zip(found, node.output) if name]
        assert len(wanted) == len(outputs)
        for (y, name), expected in zip(wanted, outputs):
            assert y.dtype == expected.dtype and y.shape == expected.shape
            rtol = 4 * 2.0**-8 if y.dtype.name == "bfloat16" else case.rtol
            y, expected = y.astype(np.float64), expected.astype(np.float64)
            np.testing.assert_allclose(y, expected, rtol, case.atol, err_msg=name)
            finite = np.isfinite(expected)
            largest = np.abs(y[finite] - expected[finite]).max(initial=0)
            print(f"{name}: {largest:.3g} is the largest difference, of {outputs[0].dtype}")
            if outputs[0].dtype == np.float32:
                same(y, expected, FLOAT32)


@pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None, reason="onnx is not installed: pip install 'refattn[onnx]'"
)
def test_no_case_is_left_out():
    nodes = [
        (case.values[0].model.graph.node[0].op_type, case.values[0].model.opset_import[0].version) for case in CASES
    ]
    assert {name: sum(op == name for op, _ in nodes) for name in COUNTS} == COUNTS
    attention = [opset for op, opset in nodes if op == "Attention"]
    assert {opset: attention.count(opset) for opset in set(attention)} == {23: 69, 24: 13, 25: 11}


HARD = [
    pytest.param(case, opset, id=f"{case.__name__}-{opset}")
    for opset, more in ((23, set()), (24, set()), (25, {"window"}))
    for case in conventions.CASES
    if conventions.needs(*case(np.random.default_rng(0))) <= conventions.OF_ONNX | more and case.__name__ != "no_keys"
]  # without keys ONNX's evaluator raises an error


@pytest.mark.parametrize("case, opset", HARD)
def test_attention_of_hard_inputs(case, opset):
    """NaN, infinities, empty rows and all: the reference's answer is that of ONNX's own evaluator, in float64."""
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed: pip install 'refattn[onnx]'")
    from onnx import helper

    from refattn.frameworks.onnx import attention

    args, options = case(np.random.default_rng(0))
    model, tensors = elsewhere.onnx_attention(args, options, opset)
    (node,) = model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    with np.errstate(all="ignore"):
        expected = reference.ReferenceEvaluator(model).run(None, tensors)[0]
    same(attention(*(tensors.get(name) for name in node.input), **attributes, opset=opset)[0], expected, 1e-12)
