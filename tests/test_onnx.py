"""ONNX's own node cases, as the installed `onnx` generates them: the reference gives the outputs they expect. And the
other way about: ONNX's reference evaluator and ONNX Runtime give what the reference says, where they do not depart.

rtol and atol are those of the cases (1e-3 and 1e-7); float32 outputs are also held to FLOAT32 of their largest entry.
Not so bfloat16, of which 1e-3 is a quarter of u = 2^-8: the cases round to it after every operation (logits, their
exponentials, the sum, the quotient, ...) and so expect numbers that are off by a few u themselves; 4 u are allowed.
"""

import importlib.util
import warnings

import numpy as np
import pytest

from refattn import frameworks
from refattn.oracle.contract import NotHandled
from refattn.trials import judged
from tests import attention_elsewhere as elsewhere
from tests import test_conventions as conventions
from tests.foreign import with_one_off, wrong
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


# --- the targets --------------------------------------------------------------------------------------------------


def targets(wanted=lambda target, dtype: True):
    found = []
    for framework in ("onnx", "onnxruntime"):
        try:
            rows = frameworks.load(framework).TARGETS
        except ImportError:
            continue
        rows = [(t, dtype) for t in rows for dtype in t.dtypes if wanted(t, dtype)]
        found += [pytest.param(framework, t, dtype, id=f"{framework}, {t.name}, {dtype}") for t, dtype in rows]
    return found


def of_all_families(target, dtype):
    return target.like == "dot_product_attention" and target.example is None and dtype == "float32"


@pytest.mark.parametrize(("framework", "target", "dtype"), targets())
def test_it_conforms(framework, target, dtype):
    report = judged(target, framework, dtype, max_examples=8 * target.times, seed=1)
    assert report.ok and report.examples == 8 * target.times and report.gradients == "not asked for", str(report)


@pytest.mark.parametrize(
    ("framework", "target", "dtype"), targets(lambda t, d: d == (t.dtypes[0] if len(t.dtypes) == 1 else "float32"))
)
def test_a_planted_fault_is_noticed(framework, target, dtype):
    """One element of the first output is off by a thousandth of the largest."""

    def spoil(y):
        y = np.array(y)
        y.flat[-1] += 1e-3 * np.abs(y[np.isfinite(y)]).max(initial=1e-3)
        return y

    report = judged(target, framework, dtype, with_one_off(target.function, spoil), max_examples=3, seed=1)
    outputs, gradients = wrong(report)
    assert outputs in ({"out"}, {"y"}) and not gradients, str(report)


@pytest.mark.parametrize(("framework", "target", "dtype"), targets(of_all_families))
def test_rows_without_keys(framework, target, dtype):
    report = judged(target, framework, dtype, families="empty_rows", max_examples=4)
    few = "GroupQuery" in target.name  # most of them are a finding
    assert report.ok and (report.examples == 4 or (few and report.examples)), str(report)


def test_every_operator_is_a_target():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'refattn[onnx]'")
    operators = {"Attention-23", "Attention-24", "Attention-25", "RotaryEmbedding", "LayerNormalization"}
    operators |= {"RMSNormalization", "GroupNormalization", "BatchNormalization", "Softmax", "LogSoftmax"}
    operators |= {"ReduceLogSumExp", "Gemm", "MatMul", "Conv", "MaxPool", "AveragePool", "Resize", "RNN", "GRU", "LSTM"}
    contrib = {"MultiHeadAttention", "GroupQueryAttention", "Attention", "RotaryEmbedding"}
    for framework, more in (("onnx", set()), ("onnxruntime", {f"com.microsoft.{name}" for name in contrib})):
        names = [t.name for t in frameworks.load(framework).TARGETS]
        assert len(names) == len(set(names))
        assert {part.strip() for name in names for part in name.split(",")} >= operators | more


class TestNode:
    @pytest.fixture(autouse=True)
    def nodes(self):
        pytest.importorskip("onnx", reason="onnx is not installed: pip install 'refattn[onnx]'")
        from refattn.frameworks import _onnx_nodes

        return _onnx_nodes

    def test_what_is_left_out(self, nodes):
        models = []

        def load(model):
            models.append(model)
            return lambda given: [list(given)]

        inputs = {"a": np.zeros(2), "b": None, "c": np.zeros((3, 1), np.int64), "d": None}
        (given,) = nodes.node(load, "Op", inputs, ("y", "", "z"), opset=20, some=1, other=None)
        (node,) = models[0].graph.node
        assert given == ["a", "c"] and list(node.input) == ["a", "", "c"] and list(node.output) == ["y", "", "z"]
        assert [a.name for a in node.attribute] == ["some"] and len(models[0].graph.output) == 2

    def test_a_model_is_loaded_once_for_all_shapes(self, nodes):
        models = []

        def load(model):
            models.append(model)
            return lambda given: [given["s"]]

        for shape in (2, 3), (4, 5):
            assert nodes.softmax(load, np.zeros(shape), axis=-1).shape == shape
        assert len(models) == 1
        nodes.softmax(load, np.zeros((2, 3, 4)), axis=-1)
        nodes.softmax(load, np.zeros((2, 3), np.float32), axis=-1)
        nodes.softmax(load, np.zeros((2, 3)), axis=0)
        assert len(models) == 4

    def test_an_attribute_that_float32_does_not_hold(self, nodes):
        x = np.zeros((2, 3))
        assert nodes.attribute(0.5, x, "a scale") == 0.5 and nodes.attribute(None, x, "a scale") is None
        assert nodes.attribute(0.1, x.astype(np.float32), "a scale") == 0.1
        with pytest.raises(NotHandled, match="a scale that float32 does not hold, in float64"):
            nodes.attribute(0.1, x, "a scale")

    def test_the_past(self, nodes):
        q, k = np.zeros((2, 1, 2, 4)), np.arange(2 * 5 * 4.0).reshape(2, 1, 5, 4)
        assert nodes.past(q, k, k, None) == (None, None) == nodes.past(q, k, k, 0)
        for offset in "bottom_right", 3, np.array([3, 3]):
            np.testing.assert_array_equal(nodes.past(q, k, k, offset)[0], k[:, :, :3])
        for offset, words in ((np.array([1, 2]), "several lengths"), (5, "behind the last"), (-1, "before the first")):
            with pytest.raises(NotHandled, match=words):
                nodes.past(q, k, k, offset)


def test_gradients_that_it_has_not():
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'refattn[onnx]'")
    target = frameworks.load("onnx").TARGETS[0]._replace(gradients=True)
    report = judged(target, "onnx", "float32", max_examples=2)
    assert report.verdicts["out"].conforms and report.verdicts["dq"].problem == "nothing came back"
