"""Pictures: what is drawn of what, that it can be read without colour, and what is said where nothing can be drawn."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from refattn import cbam_spatial, linear, multi_head, squeeze_excitation, transformer_encoder_layer
from refattn.__main__ import main
from refattn.core import About, Call, leaves
from refattn.masks import block_sparse, causal, neighbourhood, padding, window
from refattn.oracle.html import THEMES
from refattn.plot import (
    MAP,
    NothingToDraw,
    attention_of,
    draw,
    draw_attention,
    draw_gate,
    draw_gradients,
    draw_mask,
    draw_spatial,
    gradient_flow,
    gradient_norms,
    read_mask,
    receptive_field,
    save,
    style,
)  # fmt: skip
from refattn.registry import everything, mechanisms
from refattn.subjects import Picture, call_on, photograph, picture, sees, sentence, usual

DOCS = Path(__file__).resolve().parents[1] / "docs"
# of mechanisms: what has no attention map, nor any inside
WITHOUT = {
    "matrix_power_pool",
    "axial_rotary",
    "rotary",
    "sinusoidal",
    "streaming",
    "xpos",
    "context_feature_extraction",
}


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'refattn[plot]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.fixture
def ax(pyplot):
    return pyplot.figure().subplots()


# --- masks ---------------------------------------------------------------------------------------------------


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
    for draws in (lambda: draw_mask(causal(), 2, 2), lambda: draw("cbam"), style, photograph):
        with pytest.raises(ImportError, match=r"pip install 'refattn\[plot\]'"):
            draws()


@pytest.mark.parametrize(
    "mask",
    [
        causal(),
        causal() & window(3, 0),
        ~(causal(2) | window(None, 1, offset=-3)),
        neighbourhood(4, 4, 3, border="cut"),
        block_sparse([[1, 0], [0, 1]], (2, 3)) & padding((1, 2)),
    ],
    ids=repr,
)
def test_a_mask_is_read_from_what_it_says_of_itself(mask):
    assert read_mask(repr(mask)) == mask


@pytest.mark.parametrize(
    "text, story",
    [
        ("window", r"window is no mask: .*missing 2 .*; it is written window\(left, right, offset\)"),
        ("window(-1, 0)", "window: left is -1, expected .* at least 0"),
        ("causl()", "refattn.masks has no causl, expected causal"),
        ("Mask()", "refattn.masks has no Mask"),
        ("causal(", "'?\\(' was never closed|unexpected EOF"),
        ("causal() and window(1, 1)", "expected one of block_sparse, .*, with arguments, and &"),
        ("causal(open('x'))", "causal"),
        ("causal.offset", "expected one of"),
        ("__import__('os').getcwd()", "expected one of"),
        ("(" * 2000 + "causal()" + ")" * 2000, "is no mask"),
    ],
)
def test_what_is_no_mask(text, story):
    with pytest.raises(ValueError, match=story):
        read_mask(text)


# --- attention, gates, gradients -----------------------------------------------------------------------------


def test_lightness_grows_with_the_value():
    matplotlib = pytest.importorskip("matplotlib")
    red, green, blue, _ = matplotlib.colormaps[MAP](np.linspace(0, 1, 256)).T
    assert (np.diff(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2) > 0).all()


def test_rings_mark_the_largest_of_each_row(ax):
    weights = np.random.default_rng(0).random((12, 12))
    assert draw_attention(weights, ax, keys=list("abcdefghijkl")) is ax
    assert np.array_equal(ax.images[0].get_array(), weights) and not ax.texts
    for line in ax.lines:
        assert np.array_equal(line.get_xdata(), weights.argmax(axis=1)) and line.get_marker() == "o"
    assert len(ax.lines) == 2  # white and black, on any colour
    assert [label.get_text() for label in ax.get_xticklabels()] == list("abcdefghijkl")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("", "query")


def test_numbers_stand_in_a_small_map(ax):
    draw_attention(np.array([[0.25, 0.75], [1.0, 0.0]]), ax)
    assert [text.get_text() for text in ax.texts] == [".25", ".75", "1.00", ".00"]
    colours = [text.get_color() for text in ax.texts]
    assert colours == ["white", "black", "black", "white"]  # on dark and on light


def test_numbers_keep_their_digits(ax):
    draw_attention(np.array([[-1.25, 10.5]]), ax)
    assert [text.get_text() for text in ax.texts] == ["-1.25", "10.50"]


def test_all_heads_have_one_scale(pyplot):
    axes = draw_attention(np.stack([np.full((3, 4), 0.1), np.full((3, 4), 0.7)]))
    assert [ax.get_title() for ax in axes] == ["head 0", "head 1"]
    assert {ax.images[0].get_clim() for ax in axes} == {(0.0, 0.7)}


@pytest.mark.parametrize("weights", [np.ones((3, 3)), np.zeros((3, 3)), np.ones((1, 1)), np.ones((1, 40))])
def test_weights_without_contrast(ax, weights):
    draw_attention(weights, ax)
    ax.figure.canvas.draw()
    low, high = ax.images[0].get_clim()
    assert low < high


def test_a_scale_shows_small_differences(ax):
    draw_attention(np.array([[0.5, 0.501]]), ax)
    assert ax.images[0].get_clim() == (0.5, 0.501)


@pytest.mark.parametrize(
    "draws, story",
    [
        (lambda ax: draw_attention(np.zeros(3), ax), r"weights is \(3,\), expected \(Q, K\), or \(H, Q, K\)"),
        (lambda ax: draw_attention(np.zeros((2, 0)), ax), "one query and one key at least"),
        (lambda ax: draw_attention(np.zeros((2, 3, 3)), ax), "ax is .*, expected None, for 2 heads"),
        (lambda ax: draw_gate(np.zeros((2, 2)), ax), r"gate is \(2, 2\), expected \(C,\)"),
        (lambda ax: draw_spatial(np.zeros(4), ax), r"gate is \(4,\), expected \(H, W\)"),
        (lambda ax: draw_gradients({}, ax), "norms is {}, expected one at least"),
    ],
)
def test_arrays_that_are_no_picture(ax, draws, story):
    with pytest.raises(ValueError, match=story):
        draws(ax)


def test_a_gate_has_a_bar_and_a_number_for_each_channel(ax):
    draw_gate(np.array([0.25, 1.0, 0.0]), ax, names=["red", "green", "blue"])
    assert [bar.get_height() for bar in ax.patches] == [0.25, 1.0, 0.0]
    assert [text.get_text() for text in ax.texts] == [".25", "1.00", ".00"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["red", "green", "blue"]


def test_contours_lie_around_the_most_and_the_least(ax):
    i, j = np.indices((48, 48))
    gate = np.exp(-((i - 36) ** 2 + (j - 12) ** 2) / 200)
    draw_spatial(gate, ax, image=np.zeros((96, 96)))
    below, above = ax.images
    assert below.get_extent() == above.get_extent() == [-0.5, 47.5, 47.5, -0.5]
    (contours,) = ax.collections
    _, most = contours.get_paths()
    middle = most.vertices.mean(axis=0)
    assert np.abs(middle - [12, 36]).max() < 1  # x is the column
    assert len(contours.get_linestyles()) == 2 and contours.get_linestyles()[0] != contours.get_linestyles()[1]
    scale = ax.figure.axes[1]
    assert np.allclose([line.get_ydata()[0] for line in scale.lines], contours.levels)


def test_a_gate_that_is_the_same_everywhere(ax):
    draw_spatial(np.full((20, 20), 0.5), ax)
    assert ax.get_xlabel() == "0.5, everywhere" and not ax.collections


def test_gradients_on_a_logarithmic_scale(ax):
    draw_gradients({"x": 100.0, "params.w": 0.01, "params.b": 0.0}, ax)
    assert ax.get_xscale() == "log" and [text.get_text() for text in ax.texts] == ["1.0e+02", "1.0e-02", "0"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "params.w", "params.b"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first above
    draw_gradients({"x": 0.0}, ax)
    ax.figure.canvas.draw()


def test_norms_of_gradients():
    rng = np.random.default_rng(3)
    x, params = rng.normal(size=(5, 4)), linear.init(rng, 4, 2)
    norms = gradient_norms(linear, Call((x, params), {}), seed=1)
    out, saved = linear.forward(x, params)
    dx, dparams = linear.backward(np.random.default_rng(1).normal(size=out.shape), saved)
    expected = {"x": dx, "params.weight": dparams.weight, "params.bias": dparams.bias}
    assert norms == pytest.approx({name: np.linalg.norm(g) for name, g in expected.items()})


def test_gradients_flow_where_attention_lets_them():
    call = call_on(transformer_encoder_layer, sentence())
    free = gradient_flow(transformer_encoder_layer, call)
    causally = gradient_flow(transformer_encoder_layer, call._replace(options=call.options | {"is_causal": True}))
    assert free.shape == causally.shape == (11, 11) and free.min() > 0
    assert np.array_equal(causally, np.tril(causally)) and np.tril(causally).sum() > 0
    assert np.tril(causally, 0)[-1] == pytest.approx(free[-1])  # the last query sees all of it in both


def test_a_pixel_depends_on_its_window():
    call = call_on(cbam_spatial, picture(np.random.default_rng(0).random((40, 40))))
    (x, params), options = call
    params = params._replace(norm=None) if getattr(params, "norm", None) is not None else params
    field = receptive_field(cbam_spatial, Call((x, params), options), (20, 10))
    rows, columns = np.nonzero(field)
    reach = [rows.min() - 20, rows.max() - 20, columns.min() - 10, columns.max() - 10]
    assert reach == [-3, 3, -3, 3]  # a kernel of 7


# --- what is looked at ---------------------------------------------------------------------------------------


def test_style_is_for_the_length_of_a_block(pyplot):
    before = dict(pyplot.rcParams)
    for dark in (False, True):
        with style(dark):
            paper, ink = THEMES["dark" if dark else "light"]
            assert pyplot.rcParams["axes.facecolor"] == paper and pyplot.rcParams["text.color"] == ink
    assert dict(pyplot.rcParams) == before


def test_the_photograph():
    pytest.importorskip("matplotlib")
    seen = picture(photograph())
    assert seen.grey.shape == seen.features.shape[1:] == (512, 512) and (seen.grey.min(), seen.grey.max()) == (0, 1)
    assert seen.names[:4] == ["red", "green", "blue", "light"] and len(seen.features) == len(seen.names) == 8
    assert np.allclose((seen.features**2).mean(axis=(1, 2)), 1)


def test_without_the_photograph(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.cbook._get_data_path", lambda *_: Path("nowhere/grace_hopper.jpg"))
    with pytest.raises(FileNotFoundError, match="this matplotlib comes without its photograph"):
        photograph()


def test_edges_are_called_what_they_are():
    stripes = np.tile(np.arange(16) % 8 < 4, (16, 1)).astype(float)
    for image, name in ((stripes, "upright"), (stripes.T, "level")):
        raw = picture(image)
        other = {"upright": "level", "level": "upright"}[name]
        assert raw.features[raw.names.index(name)].any() and not raw.features[raw.names.index(other)].any()
    i, j = np.indices((16, 16))
    for image, name in (((i - j > 0), "falling"), ((i + j > 15), "rising")):  # the edge goes down to the right, or up
        seen = picture(image.astype(float))
        falling, rising = (np.count_nonzero(seen.features[seen.names.index(n)]) for n in ("falling", "rising"))
        assert (falling > 2 * rising) == (name == "falling") and (rising > 2 * falling) == (name == "rising")


@pytest.mark.parametrize("image", [np.zeros((9, 12)), np.full((9, 9, 4), 255, np.uint8), np.ones((8, 20, 3))])
def test_an_image_without_contrast(image):
    seen = picture(image)
    side = min(image.shape[:2])
    assert seen.features.shape == (8, side, side) and np.isfinite(seen.features).all()


def test_a_large_image_is_made_smaller():
    pixels = np.zeros((1600, 1100, 3), np.uint8)
    pixels[250:800] = 200  # the upper half of the middle square
    seen = picture(pixels)
    assert seen.grey.shape == (550, 550) and (seen.grey[:275] == 1).all() and (seen.grey[275:] == 0).all()
    assert picture(photograph()).grey.shape == (512, 512)


def test_words_with_common_letters_are_alike():
    near = sentence(["cat", "cats", "dog", "cat"]).vectors
    assert np.array_equal(near[0], near[3])
    cosine = near @ near.T / np.linalg.norm(near, axis=1) / np.linalg.norm(near, axis=1)[:, None]
    assert cosine[0, 1] > 0.5 > abs(cosine[0, 2])


@pytest.fixture(scope="module")
def looked_at():
    pytest.importorskip("matplotlib")
    return {kind: usual(kind) for kind in ("image", "sequence", "numbers")}


@pytest.mark.parametrize("mechanism", mechanisms().values(), ids=str)
def test_every_mechanism_has_a_picture_or_says_that_it_has_none(mechanism, looked_at):
    data = looked_at[sees(mechanism)]
    if mechanism.name in WITHOUT:
        with pytest.raises(NothingToDraw, match=f"{mechanism} has no attention map: there is nothing to draw"):
            draw(mechanism, data)
        return
    call = call_on(mechanism, data)
    again = call_on(mechanism, data)
    for (path, x), (_, y) in zip(leaves(call.args), leaves(again.args), strict=True):
        assert np.array_equal(x, y), path
    shown = attention_of(mechanism, *mechanism.forward(*call.args, **call.options))
    assert shown and all(np.isfinite(one.value).all() and one.value.size for one in shown)
    with style():
        figure = draw(mechanism, data, panels=2)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles and all(title.startswith(shown[0].name) or title == "the image" for title in titles)


@pytest.mark.parametrize("mechanism", [m for m in everything().values() if m.ABOUT.weights], ids=str)
def test_what_about_names_is_what_is_drawn(mechanism, looked_at):
    call = call_on(mechanism, looked_at[sees(mechanism)])
    out, saved = mechanism.forward(*call.args, **call.options)
    first = attention_of(mechanism, out, saved)[0]
    assert first.name == mechanism.ABOUT.weights
    whole = getattr(saved, first.name)
    assert np.isin(first.value, whole).all() and first.value.size <= whole.size


def test_an_image_argument_is_the_image(looked_at):
    (x, params), _ = call_on(squeeze_excitation, looked_at["image"])
    assert x.shape == (1, 8, 96, 96)
    middles = np.arange(96) * 512 // 96 + 2
    assert np.corrcoef(x[0, 3].ravel(), looked_at["image"].grey[np.ix_(middles, middles)].ravel())[0, 1] > 0.9
    assert not params.b1.any() and params.w1.std() > 0  # as init draws them


def test_every_sequence_argument_is_the_sentence(looked_at):
    (q, k, v, _), options = call_on(multi_head, looked_at["sequence"])
    assert np.array_equal(q, k) and np.array_equal(k, v) and q.shape == (1, 11, 16)
    assert np.array_equal(q[0, 0], q[0, 4]) and not np.array_equal(q[0, 0], q[0, 1])  # "the" and "the", "small"
    assert options["mask"] is None and options["is_causal"] is False


def test_other_seeds_are_other_parameters(looked_at):
    one, other = (call_on(multi_head, looked_at["sequence"], seed).args[3].q.weight for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_the_inside_of_a_hybrid_is_drawn(looked_at):
    figure = draw("cbam", looked_at["image"])
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["the image", "channel_gate", "spatial.gate"]
    figure = draw("cbam", looked_at["image"], panels=2)
    assert figure.get_suptitle() == "cbam, 2 of 3 pictures"
    figure = draw("cbam", looked_at["image"], beside=False)
    assert figure.axes[0].get_title() == "channel_gate"


def test_weights_that_are_not_finite(looked_at):
    data = looked_at["sequence"]
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="attn of scaled_dot_product is not finite"):
        draw("scaled_dot_product", data._replace(vectors=data.vectors * 1e200))


def test_a_mechanism_of_ones_own(looked_at):
    own = {name: getattr(squeeze_excitation, name) for name in ("forward", "backward", "example", "init", "Saved")}
    mine = SimpleNamespace(**own, ABOUT=About(weights="gate"), __name__="mine")
    assert len(draw(mine, looked_at["image"]).axes) == 2
    with pytest.raises(ValueError, match=r"plot\.draw: data is 'Sentence', expected a Picture"):
        draw(mine, looked_at["sequence"])


# --- refattn plot --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["plot", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_picture_in_a_file(run, tmp_path):
    assert run("squeeze_excitation", "--out", "gate.png") == (0, "squeeze_excitation is drawn in gate.png\n", "")
    light = (tmp_path / "gate.png").read_bytes()
    assert light.startswith(b"\x89PNG")
    run("squeeze_excitation", "--out", "gate.png")
    assert (tmp_path / "gate.png").read_bytes() == light
    for more in ("--dark",), ("--seed", 1):
        run("squeeze_excitation", "--out", "gate.png", *more)
        assert (tmp_path / "gate.png").read_bytes() != light
    assert stat.S_IMODE((tmp_path / "gate.png").stat().st_mode) == 0o666 & ~_umask()
    assert os.listdir(tmp_path) == ["gate.png"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_same_svg_twice(run, tmp_path):
    for name in ("one.svg", "other.svg"):
        assert run("causal() & window(2, 0)", "--length", 8, "--out", name)[0] == 0
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "other.svg").read_text()


@pytest.mark.parametrize("name, file", [("causal", "causal.png"), ("padding((1, 3)) & ~window(1, 1)", None)])
def test_without_a_display_a_file_of_its_name(run, tmp_path, name, file):
    file = file or "padding-1-3-window-1-1.png"
    assert run(name) == (0, f"{name} is drawn in {file}\n", "")
    assert os.listdir(tmp_path) == [file]


def test_with_a_display_a_window(run, tmp_path, monkeypatch, pyplot):
    figure, shown = pyplot.figure(), []
    monkeypatch.setattr("refattn.plot._window", lambda: figure)
    monkeypatch.setattr(pyplot, "show", lambda: shown.append([ax.get_title() for ax in figure.axes]))
    assert run("squeeze_excitation") == (0, "", "") and shown == [["the image", "gate"]]
    assert os.listdir(tmp_path) == []


def test_a_window_that_was_asked_for_and_cannot_be(tmp_path):
    pytest.importorskip("matplotlib")
    hidden = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    code = "from refattn.__main__ import main; raise SystemExit(main(['plot', 'causal']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=hidden | {"MPLBACKEND": "tkagg"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "causal is drawn in causal.png\n"), done.stderr


def test_an_image_of_ones_own(run, tmp_path):
    from matplotlib.image import imsave

    rng = np.random.default_rng(0)
    for name, pixels in (
        ("a.png", rng.random((30, 20, 3))),
        ("b.jpg", rng.random((16, 16))),
        ("c.png", rng.random((9, 9, 4))),
    ):
        imsave(tmp_path / name, pixels)
        assert run("squeeze_excitation", "--input", name, "--out", "out.png")[0] == 0
    one = (tmp_path / "out.png").read_bytes()
    run("squeeze_excitation", "--input", "a.png", "--out", "out.png")
    assert (tmp_path / "out.png").read_bytes() != one


def test_arrays_of_ones_own(run, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "grey.npy", rng.random((30, 20)).astype(np.float32))
    np.save(tmp_path / "features.npy", rng.integers(0, 9, (5, 12, 10)))
    np.save(tmp_path / "tokens.npy", rng.random((7, 5)))
    for name, file in (("cbam", "grey"), ("cbam", "features"), ("multi_head", "tokens"), ("luong_decoder", "tokens")):
        assert run(name, "--input", f"{file}.npy", "--out", "out.png") == (0, f"{name} is drawn in out.png\n", "")


def test_features_are_taken_as_they_are(tmp_path):
    from refattn.subjects import read_input

    x = np.random.default_rng(0).random((5, 12, 10))
    np.save(tmp_path / "x.npy", x)
    seen = read_input(tmp_path / "x.npy", everything()["squeeze_excitation"])
    assert isinstance(seen, Picture) and np.array_equal(seen.features, x[:, 1:11])
    (placed, _), _ = call_on(squeeze_excitation, seen)
    assert np.allclose(placed[0], seen.features[np.arange(placed.shape[1]) % 5])


@pytest.mark.parametrize(
    "arguments, story",
    [
        (["squeeze_exitation"], "no mask 'squeeze_exitation'; did you mean squeeze_excitation"),
        (["causl"], "did you mean causal"),
        (["rotary"], "rotary has no attention map: there is nothing to draw"),
        (["linear"], "linear has no attention map"),
        (["window"], r"it is written window\(left, right, offset\)"),
        (["neighbourhood(3, 3, 3)"], "cannot be drawn for 16 queries and keys: .* positions from 0 to 8; try --length"),
        (["causal", "--input", "short.npy"], "causal is a mask, which takes no input"),
        (["alibi", "--input", "short.npy"], "alibi takes no image and no sequence"),
        (["cbam", "--input", "nowhere.png"], "nowhere.png cannot be read as an image: No such file"),
        (["cbam", "--input", "nowhere.npy"], "nowhere.npy cannot be read: No such file"),
        (["cbam", "--input", "text.png"], "text.png cannot be read as an image"),
        (["cbam", "--input", "text.npy"], "text.npy cannot be read"),
        (["cbam", "--input", "pickle.npy"], "pickle.npy cannot be read: Object arrays cannot be loaded"),
        (["cbam", "--input", "words.npy"], "words.npy does not hold one array of real numbers"),
        (["cbam", "--input", "nan.npy"], "nan.npy has NaN, infinity or numbers beyond 1e"),
        (["cbam", "--input", "huge.npy"], "huge.npy has NaN, infinity or numbers beyond 1e"),
        (["second_order_channel", "--input", "zero.npy"], "variance of x is .*, expected images that are not constant"),
        (["cbam", "--input", "short.npy"], r"short.npy has shape \(3,\), expected \(H, W\) or \(C, H, W\), 8 pixels"),
        (["cbam", "--input", "small.npy"], r"has shape \(4, 9\), expected .* 8 pixels or more along a side, for cbam"),
        (["cbam", "--input", "small.png"], "small.png has 9 x 4 pixels, expected 8 x 8 or more"),
        (["multi_head", "--input", "small.png"], r"small.png is an image, but multi_head takes a sequence"),
        (["multi_head", "--input", "cube.npy"], r"has shape \(2, 9, 9\), expected \(T, D\), T at most 256"),
        (["multi_head", "--input", "long.npy"], r"has shape \(257, 2\)"),
        (["causal", "--out", "x.docx"], "x.docx does not say in which format: .* png"),
        (["causal", "--out", "x"], "x does not say in which format"),
        (["causal", "--out", "nowhere/x.png"], "--out: cannot write to nowhere"),
        (["causal", "--out", "."], "--out: . is a folder"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_drawn(run, tmp_path, arguments, story):
    from matplotlib.image import imsave

    arrays = {"short": np.zeros(3), "small": np.zeros((4, 9)), "cube": np.zeros((2, 9, 9)), "long": np.zeros((257, 2))}
    arrays |= {"words": np.array(["a", "b"]), "nan": np.full((9, 9), np.nan), "zero": np.zeros((9, 9))}
    arrays |= {"huge": np.full((9, 9), -1e31)}
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    np.save("pickle.npy", np.array([None]), allow_pickle=True)
    imsave("small.png", np.zeros((4, 9)))
    for name in ("text.png", "text.npy"):
        Path(name).write_text("nothing of the kind")
    before = sorted(os.listdir())
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and err.count("\n") == 1
    with pytest.raises(AssertionError, match=story):
        raise AssertionError(err)
    assert sorted(os.listdir()) == before


def test_without_matplotlib_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "cbam"]) == 2
    assert "pip install 'refattn[plot]'" in capsys.readouterr().err


def test_a_file_is_whole_or_not_at_all(tmp_path, monkeypatch, pyplot):
    old = tmp_path / "x.png"
    old.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write .*x\.png: No space left on device"):
        save(pyplot.figure(), old)
    assert os.listdir(tmp_path) == ["x.png"] and old.read_bytes() == b"old"


# --- the gallery ---------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(DOCS))
    import pictures

    return pictures


def test_a_derivation_page_shows_the_picture_if_there_is_one(pictures, tmp_path):
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "cbam-light.png").touch()
    app, text = SimpleNamespace(srcdir=tmp_path), "# A\n\n## The model\n\nWords.\n\n## Forward\n\nMore.\n"

    def read(page):
        source = [text]
        pictures.on_derivation_pages(app, page, source)
        return source[0]

    before, _, after = read("derivations/cbam").partition("\n## Forward\n")
    assert before.count("../drawn/cbam-") == 2 and "only-dark" in before and after == "\nMore.\n"
    assert read("derivations/softmax") == read("reference/cbam") == read("cbam") == text


def test_the_gallery_is_drawn_once(pictures, tmp_path, monkeypatch):
    some = {name: everything()[name] for name in ("squeeze_excitation", "matrix_power_pool", "multi_head")}
    monkeypatch.setattr(pictures, "mechanisms", lambda: some)
    for slow in ("_photograph", "_masks", "_rounding", "_gradients"):
        monkeypatch.setattr(pictures, slow, lambda: lambda: pictures._figure(1, 1, 2, 2)[0])
    pictures.draw(tmp_path)
    names = ("squeeze_excitation", "multi_head", "photograph", "masks", "rounding", "gradients", "errors")
    files = {f"{name}-{theme}.png" for name in names for theme in ("light", "dark")}
    assert set(os.listdir(tmp_path)) == files | {"gallery.txt", "made-from.txt"}
    text = (tmp_path / "gallery.txt").read_text()
    for shown in (
        "drawn/squeeze_excitation-dark.png\n:class: only-dark",
        "Without an attention map: [matrix_power_pool]",
        "## channel",
    ):
        assert shown in text
    assert "primitives" not in text
    (tmp_path / "masks-dark.png").write_bytes(b"seen")
    pictures.draw(tmp_path)
    assert (tmp_path / "masks-dark.png").read_bytes() == b"seen"  # nothing was drawn again
    monkeypatch.setattr(pictures, "_inputs", lambda: "something else")
    pictures.draw(tmp_path)
    assert (tmp_path / "masks-dark.png").read_bytes() != b"seen"


def test_every_picture_of_the_gallery_is_drawn(pictures):
    page = (DOCS / "gallery.md").read_text()
    source = (DOCS / "pictures.py").read_text()
    shown = {line.split("drawn/")[1] for line in page.splitlines() if "{image}" in line}
    assert {name.rpartition("-")[0] for name in shown} == {"photograph", "masks", "errors", "rounding", "gradients"}
    for name in shown:
        assert name.rpartition("-")[2] in ("light.png", "dark.png") and f'"{name.rpartition("-")[0]}' in source


def test_what_the_gallery_says_of_rounding(pictures):
    few, many = pictures._errors_at(256), pictures._errors_at(8192)
    assert many["in blocks of 64"] < many["plain"]
    assert many["in blocks, float32 inside"] == pytest.approx(few["in blocks, float32 inside"], rel=0.2)
    assert many["every result stored"] == pytest.approx(2 * many["in blocks, float32 inside"], rel=0.2)
    assert many["in blocks, sums stored"] > 8 * many["in blocks, float32 inside"]


def test_what_the_gallery_says_of_gradients(pictures):
    """As much by the state as by attention at first; less than a tenth of it, and all of that, ten words on."""
    from refattn.attention.temporal import luong_decoder, luong_encoder_decoder
    from refattn.core import tree_map
    from refattn.primitives import recurrent

    call = pictures._encoder_decoder()
    out, saved = luong_encoder_decoder.forward(*call.args)
    ways = []
    for t in (0, 10):
        dout = tree_map(np.zeros_like, out)
        dout[0][0, t] = np.random.default_rng(0).normal(size=dout[0].shape[-1])
        _, dmemory, dstate, _ = luong_decoder.backward(dout, saved.decoded)
        nothing = np.zeros_like(dmemory), tree_map(np.zeros_like, dstate)
        by_state, _, _ = recurrent.backward(recurrent.Out(nothing[0], dstate), saved.encoded)
        by_attention, _, _ = recurrent.backward(recurrent.Out(dmemory, nothing[1]), saved.encoded)
        ways.append((np.linalg.norm(by_state), np.linalg.norm(by_attention)))
        if t == 0:
            reached = np.linalg.norm(by_state[0], axis=-1)
            assert reached.argmax() == 0 and reached[:3].sum() > reached[3:].sum()
    (state, attention), (state_later, attention_later) = ways
    assert state == pytest.approx(attention, rel=0.1) and attention_later == pytest.approx(attention, rel=0.1)
    assert state_later < state / 10
