"""Masks against plain double loops, written from what each is said to mean."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention, scaled_dot_product
from refattn.core import DtypeError
from refattn.masks import (
    Mask,
    block_sparse,
    causal,
    chunked,
    dilated,
    document,
    everything,
    neighbourhood,
    nothing,
    padding,
    prefix,
    strided,
    window,
)

IDS = ((0, 0, 4, 4, 4, 1, 1), (3, 3, 3, 3, 3, 3, 0))
LAYOUT = ((True, False, False), (False, False, True), (True, True, False), (False, True, True))
HEADS = (((1, 0), (1, 1)), ((0, 0), (0, 1)), ((1, 1), (0, 1)))


def shifted(i, j, length, kernel, dilation):
    """One axis of neighbourhood attention: of the pixels in step with i, the run of `kernel` most centred on i."""
    in_step = range(i % dilation, length, dilation)
    runs = [in_step[n : n + kernel] for n in range(len(in_step) - kernel + 1)]
    return j in min(runs, key=lambda run: abs(run[0] + run[-1] - 2 * i))


def pixels(width, *test):
    """Whether `test` holds of rows and of columns."""
    return lambda b, h, i, j: test[0](i // width, j // width) and test[-1](i % width, j % width)


MASKS = [  # a mask; what it says of item b, head h, query i, key j; its shape
    (everything(), lambda b, h, i, j: True, (3, 4)),
    (nothing(), lambda b, h, i, j: False, (3, 4)),
    (causal(), lambda b, h, i, j: j <= i, (5, 7)),
    (causal(2), lambda b, h, i, j: j <= i + 2, (5, 7)),
    (causal(offset=-3), lambda b, h, i, j: j <= i - 3, (7, 5)),
    (window(2, 0), lambda b, h, i, j: i - 2 <= j <= i, (7, 7)),
    (window(1, 3), lambda b, h, i, j: i - 1 <= j <= i + 3, (6, 8)),
    (window(0, None), lambda b, h, i, j: j >= i, (6, 8)),
    (window(None, 1), lambda b, h, i, j: j <= i + 1, (6, 8)),
    (window(None, None), lambda b, h, i, j: True, (3, 4)),
    (window(2, 1, offset=3), lambda b, h, i, j: i + 1 <= j <= i + 4, (4, 7)),
    (dilated(2, 3), lambda b, h, i, j: j in (i - 6, i - 3, i, i + 3, i + 6), (9, 11)),
    (dilated(0, 2), lambda b, h, i, j: j == i, (4, 4)),
    (strided(3), lambda b, h, i, j: j % 3 == i % 3, (7, 8)),
    (chunked(3), lambda b, h, i, j: any(n <= i < n + 3 and n <= j < n + 3 for n in range(0, 12, 3)), (8, 10)),
    (prefix(3), lambda b, h, i, j: j < 3 or j <= i, (6, 6)),
    (prefix((0, 4)), lambda b, h, i, j: j < (0, 4)[b] or j <= i, (2, 1, 6, 6)),
    (padding(3), lambda b, h, i, j: j < 3, (4, 5)),
    (padding((3, 0, 5)), lambda b, h, i, j: j < (3, 0, 5)[b], (3, 1, 4, 5)),
    (document((7, 7, 3, 3, 3)), lambda b, h, i, j: (i < 2) == (j < 2), (5, 5)),
    (document(IDS), lambda b, h, i, j: IDS[b][i] == IDS[b][j], (2, 1, 7, 7)),
    (document(lengths=(2, 0, 3)), lambda b, h, i, j: (i < 2) == (j < 2), (5, 5)),
    (block_sparse(((True,),), 4), lambda b, h, i, j: True, (3, 4)),
    (block_sparse(LAYOUT, 2), lambda b, h, i, j: LAYOUT[i // 2][j // 2], (8, 6)),
    (block_sparse(LAYOUT, (2, 3)), lambda b, h, i, j: LAYOUT[i // 2][j // 3], (7, 8)),
    (block_sparse(HEADS, 3), lambda b, h, i, j: HEADS[h][i // 3][j // 3], (3, 5, 6)),
    (
        neighbourhood(4, 5, 3),
        pixels(5, lambda i, j: shifted(i, j, 4, 3, 1), lambda i, j: shifted(i, j, 5, 3, 1)),
        (20, 20),
    ),
    (
        neighbourhood(7, 8, 3, dilation=2),
        pixels(8, lambda i, j: shifted(i, j, 7, 3, 2), lambda i, j: shifted(i, j, 8, 3, 2)),
        (56, 56),
    ),
    (
        neighbourhood(7, 5, 5),
        pixels(5, lambda i, j: shifted(i, j, 7, 5, 1), lambda i, j: shifted(i, j, 5, 5, 1)),
        (35, 35),
    ),
    (neighbourhood(2, 3, 1), lambda b, h, i, j: i == j, (6, 6)),
    (neighbourhood(3, 4, 3, border="cut"), pixels(4, lambda i, j: abs(i - j) <= 1), (12, 12)),
    (neighbourhood(5, 4, 3, 2, "cut"), pixels(4, lambda i, j: j in (i - 2, i, i + 2)), (20, 20)),
    (causal() & window(2, 2), lambda b, h, i, j: i - 2 <= j <= i, (6, 6)),
    (causal() | prefix(3), lambda b, h, i, j: j < 3 or j <= i, (6, 6)),
    (~causal(), lambda b, h, i, j: j > i, (6, 6)),
    (
        padding((3, 5)) & block_sparse(HEADS, 3),
        lambda b, h, i, j: j < (3, 5)[b] and HEADS[h][i // 3][j // 3],
        (2, 3, 5, 6),
    ),
    (causal() & (window(2, 0) | strided(2)), lambda b, h, i, j: j <= i and (j >= i - 2 or (i - j) % 2 == 0), (8, 8)),
]
EACH = pytest.mark.parametrize("mask, says, shape", MASKS, ids=[repr(m)[:60] for m, *_ in MASKS])


@EACH
def test_array(mask, says, shape):
    expected = np.zeros(((1, 1) + shape)[-4:], bool)
    for index in np.ndindex(expected.shape):
        expected[index] = says(*index)
    whole = mask.array(*shape[-2:])
    assert whole.dtype == bool and whole.shape == shape
    assert np.array_equal(whole, expected.reshape(shape))


@EACH
def test_any_positions_may_be_asked_for(mask, says, shape):
    rng = np.random.default_rng(0)
    whole = mask.array(*shape[-2:])
    i, j = (rng.integers(n, size=5) for n in shape[-2:])
    assert np.array_equal(mask(i[:, None], j), whole[..., i, :][..., j])
    assert np.array_equal(mask(i[:, None].astype(np.uint8), j[None]), whole[..., i, :][..., j])
    assert np.array_equal(mask(i, j), whole[..., i, j])
    assert np.array_equal(mask(int(i[0]), int(j[0])), whole[..., i[0], j[0]])


@EACH
def test_queries_that_come_later(mask, says, shape):
    whole = mask.array(*shape[-2:])
    assert np.array_equal(mask.array(2, shape[-1], offset=shape[-2] - 2), whole[..., -2:, :])
    assert mask.array(0, 3).shape[-2:] == (0, 3)


@EACH
@pytest.mark.parametrize("block", [1, 3, (2, 4), 100])
def test_blocks(mask, says, shape, block):
    whole, found = mask.array(*shape[-2:]), mask.blocks(*shape[-2:], block)
    rows, columns = block if isinstance(block, tuple) else (block, block)
    assert found.shape == (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    for *lead, r, c in np.ndindex(found.shape):
        some = whole[(*lead, slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns))]
        assert found[(*lead, r, c)] == ("full" if some.all() else "partial" if some.any() else "empty")


@EACH
def test_a_mask_is_a_value(mask, says, shape):
    again = eval(repr(mask))
    assert again == mask and hash(again) == hash(mask) and repr(again) == repr(mask) == str(mask)
    assert np.array_equal(again.array(*shape[-2:]), mask.array(*shape[-2:]))
    assert isinstance(mask, Mask) and mask != ~mask


def test_blocks_of_nothing():
    assert causal().blocks(0, 5, 2).shape == (0, 3) and causal().blocks(5, 0, 2).shape == (3, 0)


def test_blocks_of_later_queries():
    assert causal().blocks(2, 6, 2, offset=3).tolist() == [["full", "full", "partial"]]


def test_repr_reads_like_the_expression():
    for words in (
        "causal()",
        "causal() & window(4, 0)",
        "causal(offset=2) | ~window(None, 1, offset=-1)",
        "causal() & (strided(2) | chunked(3)) & padding((3, 4))",
        "causal() & (strided(2) & ~(chunked(3) | nothing()))",
        "everything() | (strided(2) | chunked(3))",
        "neighbourhood(5, 7, 3, border='cut')",
        "document(lengths=(2, 3))",
        "block_sparse(((True, False), (True, True)), (2, 3))",
    ):
        assert repr(eval(words)) == words


def test_lists_and_arrays_are_kept_as_tuples():
    assert document([[1, 2], [3, 3]]) == document(np.array([[1, 2], [3, 3]])) == document(((1, 2), (3, 3)))
    assert padding(np.array([1, 2])) == padding((1, 2)) != padding((1, 3)) and padding(np.int64(2)) == padding(2)
    assert block_sparse([[0, 1]], 2) == block_sparse(np.array([[False, True]]), 2)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_neighbourhood_moved_inside_has_all_its_keys(dilation):
    mask = neighbourhood(3 * dilation, 3 * dilation + 1, 3, dilation).array(*2 * (3 * dilation * (3 * dilation + 1),))
    assert (mask.sum(axis=-1) == 9).all() and mask.diagonal().all()


def test_a_kernel_as_large_as_the_image_sees_everything():
    assert neighbourhood(3, 3, 3).array(9, 9).all()


def test_counts_of_keys():
    assert window(4, 0).array(9, 9).sum(axis=-1).max() == 5
    assert dilated(2, 3).array(20, 20).sum(axis=-1).max() == 5


def test_the_two_conventions_of_causal():
    """top-left and bottom-right, where there are more keys than queries."""
    assert causal().show(2, 4) == "■ · · ·\n■ ■ · ·"
    assert causal(offset=2).show(2, 4) == causal().show(2, 4, offset=2) == "■ ■ ■ ·\n■ ■ ■ ■"


def test_one_position():
    assert document((5,)).array(1, 1).tolist() == document(lengths=(1,)).array(1, 1).tolist() == [[True]]


def test_pictures():
    ((title, picture),) = causal().pictures(2, 3)
    assert title == "" and np.array_equal(picture, causal().array(2, 3))
    picture[0, 2] = True  # it is the caller's own


def test_show_names_items_and_heads():
    mask = padding((1, 2)) & block_sparse([[[1]], [[0]]], 2)
    pictures = "item 0, head 0:\n■ ·", "item 0, head 1:\n· ·", "item 1, head 0:\n■ ■", "item 1, head 1:\n· ·"
    assert mask.show(1, 2) == "\n\n".join(pictures)
    assert padding((1, 2)).show(1, 2) == "item 0:\n■ ·\n\nitem 1:\n■ ■"
    assert block_sparse([[[1]], [[0]]], 2).show(1, 2) == "head 0:\n■ ■\n\nhead 1:\n· ·"


@EACH
def test_attention_takes_it(mask, says, shape):
    rng = np.random.default_rng(0)
    *_, queries, keys = shape
    b, h = ((1, 1) + shape[:-2])[-2:]
    q, k, v = rng.normal(size=(b, h, queries, 2)), rng.normal(size=(b, h, keys, 2)), rng.normal(size=(b, h, keys, 2))
    allowed = np.broadcast_to(mask.array(queries, keys), (b, h, queries, keys))
    y, saved = scaled_dot_product.forward(q, k, v, mask=allowed)
    assert ((saved.attn > 0) == allowed).all()
    assert np.abs(dot_product_attention.forward(q, k, v, attn_mask=mask)[0] - y).max(initial=0) < 1e-14


BAD = [  # what is done, and words of its error
    (lambda: window(-1, 0), "masks.window: left is -1, expected an int of at least 0 or None"),
    (lambda: window(2, 1.0), "masks.window: right is 1.0, expected an int"),
    (lambda: window(2, True), "masks.window: right is True, expected an int"),
    (lambda: window(2, 1, None), "masks.window: offset is None, expected an int"),
    (lambda: causal(0.5), "masks.causal: offset is 0.5, expected an int"),
    (lambda: dilated(-1, 2), "masks.dilated: window is -1, expected an int of at least 0"),
    (lambda: dilated(1, 0), "masks.dilated: dilation is 0, expected an int of at least 1"),
    (lambda: strided(0), "masks.strided: stride is 0, expected an int of at least 1"),
    (lambda: chunked(2.0), "masks.chunked: size is 2.0, expected an int of at least 1"),
    (lambda: prefix(-1), "masks.prefix: length is -1, expected an int of at least 0, or a sequence of them"),
    (lambda: padding((3, 1.5)), "masks.padding: kv_lengths is (3, 1.5), expected"),
    (lambda: padding(((1, 2), (3,))), "masks.padding: kv_lengths is ((1, 2), (3,)), expected"),
    (lambda: padding(((1, 2), (3, 4))), "masks.padding: kv_lengths is ((1, 2), (3, 4)), expected"),
    (lambda: padding(()), "masks.padding: kv_lengths is (), expected"),
    (lambda: document(), "masks.document: ids, lengths is (None, None), expected one of them"),
    (lambda: document((1,), (1,)), "masks.document: ids, lengths is ((1,), (1,)), expected one of them"),
    (lambda: document((0.0, 1.0)), "masks.document: ids is (0.0, 1.0), expected ints"),
    (lambda: document(((0, 1), (0,))), "masks.document: ids is ((0, 1), (0,)), expected ints"),
    (lambda: document(lengths=3), "masks.document: lengths is 3, expected one length per document"),
    (lambda: document(lengths=(3, -1)), "masks.document: lengths is (3, -1), expected"),
    (lambda: block_sparse(((1, 0), (1,)), 2), "masks.block_sparse: layout is ((1, 0), (1,)), expected bools"),
    (lambda: block_sparse(((),), 2), "masks.block_sparse: layout is ((),), expected bools"),
    (lambda: block_sparse((1, 0), 2), "masks.block_sparse: layout is (1, 0), expected bools"),
    (lambda: block_sparse(((2, 0),), 2), "masks.block_sparse: layout is ((2, 0),), expected bools"),
    (lambda: block_sparse((("x", "y"),), 2), "masks.block_sparse: layout is (('x', 'y'),), expected bools"),
    (lambda: block_sparse(((1, 0),), 0), "masks.block_sparse: block is 0, expected an int of at least 1"),
    (lambda: block_sparse(((1, 0),), (2, 2.0)), "masks.block_sparse: block is (2, 2.0), expected"),
    (lambda: neighbourhood(5, 5, 2), "masks.neighbourhood: kernel is 2, expected an odd number"),
    (lambda: neighbourhood(5.0, 5, 3), "masks.neighbourhood: height is 5.0, expected an int of at least 1"),
    (lambda: neighbourhood(5, 4, 3, 2), "masks.neighbourhood: kernel, dilation is (3, 2), expected"),
    (lambda: neighbourhood(5, 5, 3, border="wrap"), "masks.neighbourhood: border is 'wrap', expected 'shift' or 'cut'"),
    (lambda: causal().array(2.0, 3), "masks.array: queries is 2.0, expected an int of at least 0"),
    (lambda: causal().array(2, -3), "masks.array: keys is -3, expected an int of at least 0"),
    (lambda: causal().array(2, 3, 0.5), "masks.array: offset is 0.5, expected an int"),
    (lambda: causal().blocks(2, 3, 0), "masks.blocks: block is 0, expected an int of at least 1"),
    (lambda: causal().blocks(2, 3, (1, 2, 3)), "masks.blocks: block is (1, 2, 3), expected"),
    (lambda: document((0, 1)).array(3, 2), "masks.document: i is [2], expected positions from 0 to 1"),
    (lambda: document((0, 1)).array(2, 4), "masks.document: j is [2, 3], expected positions from 0 to 1"),
    (lambda: document((0, 1))(-1, 0), "masks.document: i is [-1], expected positions from 0 to 1"),
    (lambda: block_sparse(((1, 0),), 2).array(3, 4), "masks.block_sparse: i is [2], expected positions from 0 to 1"),
    (lambda: block_sparse(((1, 0),), 2).array(2, 5), "masks.block_sparse: j is [4], expected positions from 0 to 3"),
    (lambda: neighbourhood(3, 3, 3).array(10, 9), "masks.neighbourhood: i is [9], expected positions from 0 to 8"),
    (lambda: neighbourhood(3, 3, 3).array(9, 10), "masks.neighbourhood: j is [9], expected positions from 0 to 8"),
]


@pytest.mark.parametrize("run, words", BAD, ids=[words for _, words in BAD])
def test_refused(run, words):
    with pytest.raises(ValueError) as caught:
        run()
    assert str(caught.value).startswith(words)


def test_positions_are_integers():
    with pytest.raises(DtypeError, match="masks: j has dtype float64, expected positions, which are integers"):
        causal()(np.arange(2), np.arange(3.0))


def test_python_has_no_and_for_masks():
    with pytest.raises(TypeError, match=r"causal\(\) is neither true nor false, expected & for and"):
        causal() and padding(3)
    with pytest.raises(TypeError):
        causal() & np.ones((2, 2), bool)
    with pytest.raises(TypeError):
        causal() | 3


@pytest.mark.frameworks
@pytest.mark.parametrize("mask, says, shape", [row for row in MASKS if len(row[2]) == 2 and row[0] != everything()])
def test_blocks_are_those_of_flex_attention(mask, says, shape):
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="needs torch: pip install 'refattn[torch]'")
    torch = pytest.importorskip("torch")
    queries, keys = 2 * (shape[0] // 2), 3 * (shape[1] // 3)
    allowed = torch.tensor(mask.array(queries, keys).copy())
    theirs = flex.create_block_mask(lambda b, h, i, j: allowed[i, j], 1, 1, queries, keys, "cpu", (2, 3))
    ours = mask.blocks(queries, keys, (2, 3))
    assert np.array_equal(theirs.to_dense()[0, 0].bool().numpy(), ours != "empty")
    assert theirs.full_kv_num_blocks[0, 0].tolist() == (ours == "full").sum(axis=-1).tolist()


def test_the_page_shows_what_is_printed(capsys):
    """What follows a fence of Python is what it prints, line by line."""
    page = (Path(__file__).parents[1] / "docs/how-to/masks.md").read_text()
    fences = re.findall(r"^```(\w+)\n(.*?)^```", page, re.M | re.S)
    namespace = {"__name__": "fence"}
    for (language, code), (following, shown) in itertools.pairwise(fences):
        if language == "python":
            exec(code, namespace)
            printed = capsys.readouterr().out
            assert printed == (shown if following == "text" else "")
