"""Pictures of masks: what is drawn, and what is said without matplotlib."""

import sys

import numpy as np
import pytest

from refattn.masks import block_sparse, causal, padding
from refattn.plot import draw_mask


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'refattn[plot]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_one_picture(pyplot):
    ax = draw_mask(causal(), 3, 5)
    (image,) = ax.images
    assert np.array_equal(image.get_array(), causal().array(3, 5))
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("causal()", "key", "query")
    ax.figure.canvas.draw()
    assert all(tick == int(tick) for tick in (*ax.get_xticks(), *ax.get_yticks()))
    assert ax.get_ylim() == (2.5, -0.5)  # the first query above


def test_takes_part_is_darker(pyplot):
    (image,) = draw_mask(causal(), 2, 2).images
    yes, no = image.cmap(image.norm(1)), image.cmap(image.norm(0))
    assert sum(yes[:3]) < 1.5 < 2.5 < sum(no[:3])


def test_into_axes_of_ones_own(pyplot):
    _, (left, right) = pyplot.subplots(1, 2)
    assert draw_mask(causal(), 3, 5, ax=right, offset=2) is right
    assert not left.images and np.array_equal(right.images[0].get_array(), causal(2).array(3, 5))
    assert right.get_ylim() == (4.5, 1.5)  # queries stand at 2, 3 and 4


def test_a_picture_per_item_and_head(pyplot):
    mask = padding((1, 2)) & block_sparse([[[1]], [[0]]], 2)
    axes = draw_mask(mask, 2, 2)
    titles = [ax.get_title() for ax in axes]
    assert titles == ["item 0, head 0", "item 0, head 1", "item 1, head 0", "item 1, head 1"]
    assert all(np.array_equal(a.images[0].get_array(), p) for a, p in zip(axes, mask.array(2, 2).reshape(4, 2, 2)))
    with pytest.raises(ValueError, match=r"plot\.draw_mask: ax is .*, expected None, for 4 pictures"):
        draw_mask(mask, 2, 2, ax=axes[0])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'refattn\[plot\]'"):
        draw_mask(causal(), 2, 2)
