"""What is looked at in pictures: a photograph or a sentence, and a call of any mechanism on it.

    call = call_on(find("cbam"), picture(photograph()))       # or a Picture of an image of your own
    call = call_on(find("multi_head"), sentence())

The call is the mechanism's own example, with the sizes, options and arrays of a picture in the place of random ones: an
argument (N, C, H, W) becomes the image, one (B, T, D) or (B, H, T, D) the words. Options have their defaults,
parameters are as `init` draws them, untrained. So a new mechanism has a picture without a line here.
"""

import inspect
import itertools
import math
import re
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_origin

import numpy as np

from refattn.attention.dot_product import rotary
from refattn.core import Array, Call, leaves, tree_map
from refattn.draw import RandomDraw
from refattn.primitives import adaptive_average_pool

SENTENCE = ("the", "small", "cat", "saw", "the", "big", "dog", "and", "the", "dog", "ran")
PIXELS, PIXELS_IN_PAIRS = 96, 24  # along a side of an image; where every pixel attends to every pixel
LEAST, LARGEST, LONGEST = 8, 512, 256  # pixels along a side, and where they are made fewer; items of a sequence
HUGE = 1e30  # beyond, squares and products come near to overflow
CREDIT = "Commodore Grace Hopper, 1984, photograph of the US Navy, in the public domain"


def matplotlib():
    """The package, or an ImportError that says which extra to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"matplotlib cannot be imported ({error}): pip install 'refattn[plot]'") from error
    return matplotlib


# --- a photograph, or a sentence ----------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image as a mechanism sees it."""

    grey: np.ndarray  # (H, W), from 0 to 1
    features: np.ndarray  # (C, H, W)
    names: list  # of the channels


class Sentence(NamedTuple):
    """A sequence as a mechanism sees it."""

    words: list
    vectors: np.ndarray  # (T, D)
    features: int  # that a head gets, of the D


def photograph():
    """The one that comes with matplotlib, as an array (H, W, 3). CREDIT says what it is."""
    matplotlib()
    from matplotlib import cbook
    from matplotlib.image import imread

    try:
        with cbook.get_sample_data("grace_hopper.jpg") as file:
            return imread(file, format="jpg")
    except FileNotFoundError:  # some distributions leave out the sample data
        raise FileNotFoundError(
            "this matplotlib comes without its photograph: an image of your own is needed"
        ) from None


def picture(pixels):
    """The middle square of an image, (H, W), (H, W, 3) or (H, W, 4), as eight channels: colours, light, edges."""
    pixels = np.asarray(pixels)
    colours = np.moveaxis(pixels[..., :3], -1, 0) if pixels.ndim == 3 else np.stack([pixels] * 3)
    red, green, blue = colours = _shrunk(_square(colours)) / (255 if pixels.dtype == np.uint8 else 1)
    light = 0.3 * red + 0.59 * green + 0.11 * blue
    low, high = float(light.min()), float(light.max())
    light = (light - low) / ((high - low) or 1.0)
    down, right = np.gradient(light)
    edges = np.abs([right, down, right - down, right + down])  # light changes across an edge, not along it
    names = ["red", "green", "blue", "light", "upright", "level", "falling", "rising"]
    features = np.concatenate([colours, light[None], edges])
    power = np.sqrt((features**2).mean(axis=(1, 2), keepdims=True))
    return Picture(light, features / np.where(power > 0, power, 1), names)


def sentence(words=None):
    """Words as vectors of 64 numbers, made of their letters: words with common letters are alike, equal ones equal."""
    words = SENTENCE if words is None else words
    return Sentence(list(words), np.array([_vector(word) for word in words]), 16)


def _vector(word):
    marked = f"<{word}>"
    pairs = [a + b for a, b in itertools.pairwise(marked)]
    seeds = ([ord(letter) for letter in pair] for pair in pairs)
    total = sum(np.random.default_rng(seed).normal(size=64) for seed in seeds)
    return total / math.sqrt(len(pairs))


def _square(x):
    """The middle square of (..., H, W)."""
    height, width = x.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return x[..., top : top + side, left : left + side]


def _shrunk(x):
    """(C, side, side), by averages of whole pixels, to a side of at least LARGEST, but less than twice that."""
    times = max(1, x.shape[-1] // LARGEST)
    side = x.shape[-1] // times
    blocks = x[:, : side * times, : side * times].reshape(len(x), side, times, side, times)
    return blocks.mean(axis=(2, 4), dtype=np.float64)


def _resized(x, height, width):
    """(C, H, W) to (C, height, width), by averages."""
    return adaptive_average_pool.forward(x[None], size=(height, width))[0][0]


# --- a call of any mechanism on it --------------------------------------------------------------------------


def axes_of(hint):
    """["N", "C", "H", "W"] of Shaped[Array, "N C H W"], also where it may be None; [] of what is no array."""
    if get_origin(hint) is Annotated:
        kind, axes = get_args(hint)
        return axes.split() if kind is Array else []
    return next((found for found in map(axes_of, get_args(hint)) if found), [])


def is_image(axes):
    return axes[:1] == ["N"] and (axes[2:] == ["*S"] or [a[0] for a in axes[2:]] == ["H", "W"])


def is_sequence(name, axes):
    """(B, ..., T, D), and no table of a rotation."""
    letters = len(axes) >= 3 and axes[0] in ("N", "B") and axes[-2].isalpha() and axes[-1].isalpha()
    return letters and not is_image(axes) and name not in ("cos", "sin")


class _PictureDraw(RandomDraw):
    """Answers an `example` with the sizes of a picture, the defaults of options, and parameters as init draws them."""

    def __init__(self, seed, sizes, defaults, wide):
        super().__init__(seed)
        self.sizes, self.defaults, self.wide = sizes, defaults, wide  # wide: without heads, letters are features
        self.numbers = np.random.default_rng(seed)  # of arrays, which the rng of init does not depend on
        self.answers, self.trees = {}, []

    def size(self, name, low=1, high=4):
        part, _, whole = name.partition(" / ")
        features = whole in ("heads", "key_heads") or (self.wide and (name.isupper() or name == "units"))
        answer = self.sizes.get(part, 8 if features else high)  # with one feature or two, all keys look alike
        if part in self.sizes and whole:
            answer //= math.prod(self.answers.get(word, 1) for word in re.findall(r"\w+", whole))
        self.answers[name] = max(low, answer)
        return self.answers[name]

    def choice(self, name, *options):
        simple = [o for o in options if o is None or type(o) in (bool, int, float, str)]
        known = [table[key] for table in (self.sizes, self.defaults) for key in (name, name.split()[0]) if key in table]
        found = [o for want in [*known, False, None] for o in simple if type(o) is type(want) and o == want]
        if name == "heads":  # as many as there may be
            found = [options[-1]]
        elif not found and all(type(o) is int for o in options) and " / " not in name:
            found = [min(options) if name == "reduction" else max(options)]
        self.answers[name] = found[0] if found else options[0]
        return self.answers[name]

    def array(self, *shape):
        return self.numbers.normal(size=shape)

    def integers(self, low, high, *shape):
        whole = len(shape) == 1  # lengths, of which nothing is left out
        return np.full(shape, high) if whole else super().integers(low, high, *shape)

    def like(self, tree):
        """The tree itself; a table that init fills with zeros says nothing, and is drawn."""
        tree = tree_map(lambda x: self.array(*x.shape) if x.ndim > 1 and not np.any(x) else x, tree)
        self.trees.append(tree)
        return tree

    def drawn(self, tree):
        """`tree`, but with the numbers that init gave: examples move them away from kinks."""
        for one in reversed([part for whole in self.trees for part in _parts(whole)]):
            if type(one) is type(tree) and _form(one) == _form(tree):
                return one
        return tree


def _parts(tree):
    yield tree
    if type(tree) is tuple:
        for child in tree:
            yield from _parts(child)


def _form(tree):
    return [(path, np.shape(leaf)) for path, leaf in leaves(tree)]


def sees(mechanism):
    """ "image" or "sequence": what arguments of its forward are; "numbers" if they are neither, and stay its own."""
    hints = hints_of(mechanism)
    if any(is_image(axes) for _, axes in hints):
        return "image"
    return "sequence" if any(is_sequence(name, axes) for name, axes in hints) else "numbers"


def usual(kind):
    """The Picture or the Sentence that is taken where none is given."""
    return picture(photograph()) if kind == "image" else sentence() if kind == "sequence" else None


def hints_of(mechanism):
    """(name, axes) of every argument of its forward."""
    return [(name, axes_of(hint)) for name, hint in mechanism.forward.hints.items()]


def call_on(mechanism, data, seed=0):
    """The mechanism's example, on a Picture or a Sentence, with parameters as its init draws them from the seed."""
    forward = mechanism.forward.__wrapped__
    hints = dict(hints_of(mechanism))
    weights = axes_of(mechanism.Saved.__annotations__.get(mechanism.ABOUT.weights))
    kind = sees(mechanism)
    image, length = kind == "image", len(getattr(data, "vectors", SENTENCE))
    if image:
        side = min(_side(weights), *data.grey.shape)
        sizes = dict.fromkeys(("H", "W", "S0", "S1"), side) | {"N": 1, "axes": 2}
        sizes |= {axes[1]: len(data.features) for axes in hints.values() if is_image(axes) and axes[1] in ("C", "I")}
    else:
        sequences = [axes for name, axes in hints.items() if is_sequence(name, axes)]
        sizes = {axes[-1]: data.features for axes in sequences}
        sizes |= {letter: length for letter in weights[-2:] if letter.isalpha() and letter in "TSQK"}
        sizes |= {axes[-2]: length for axes in sequences}
        sizes |= {axes[0]: 1 for axes in sequences}
    defaults = _defaults(getattr(mechanism, "init", None)) | _defaults(forward)
    draw = _PictureDraw(seed, sizes, defaults, wide=not image and len(weights) == 3)
    args, options = mechanism.example(draw)
    images = [value for value, axes in zip(args, hints.values()) if is_image(axes)]
    times = max(1, side // images[0].shape[-1]) if len(images) > 1 else 0  # of several, each has a scale of its own
    placed = []
    for (name, axes), value in zip(hints.items(), args):
        if value is None:
            pass
        elif is_image(axes):
            shape = tuple(n * times for n in value.shape[2:]) if times else (side, side)
            value = _images(data, value.shape[:2], shape)
        elif is_sequence(name, axes) and not image:
            value = _sequences(data, value.shape)
        elif name in ("cos", "sin"):
            table = rotary.tables(np.arange(value.shape[1]), rotary.frequencies(2 * value.shape[2]))
            value = np.broadcast_to(table[name == "sin"], value.shape).copy()
        elif isinstance(value, tuple):
            value = draw.drawn(value)
        placed.append(value)
    return Call(tuple(placed), options)


def _side(axes):
    """How many pixels an image has along a side, by the axes of what is drawn."""
    return PIXELS if axes[1:2] == ["C"] or [a[0] for a in axes[-2:]] == ["H", "W"] else PIXELS_IN_PAIRS


def _defaults(function):
    if function is None:
        return {}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _images(data, lead, shape):
    """(N, C, H, W): the image, and where a batch has to vary, paler and mirrored, stronger and upside down."""
    count, channels = lead
    x = _resized(data.features, *shape)[np.arange(channels) % len(data.features)]
    turned = [x, x[..., ::-1] / 2, x[..., ::-1, :] * 2]
    return np.stack([turned[n % 3] for n in range(count)])


def _sequences(data, shape):
    """(B, T, D) or (B, H, ..., T, D): the last T words, in a circle where T is more; each head has its own features."""
    *lead, tokens, features = shape
    words = np.arange(tokens) - tokens  # the end is the end of the sentence
    columns = np.arange(math.prod(lead[1:]) * features).reshape(*lead[1:], 1, features)
    total, width = data.vectors.shape
    x = data.vectors[words[:, None] % total, columns % width]
    return np.broadcast_to(x, shape).copy()


# --- from a file --------------------------------------------------------------------------------------------


def read_input(path, mechanism):
    """A Picture or a Sentence from a file, as the mechanism needs it; a ValueError says what is wrong with it."""
    path, kind = Path(path), sees(mechanism)
    if kind == "numbers":
        raise ValueError(f"{mechanism} takes no image and no sequence")
    if path.suffix != ".npy":
        if kind == "sequence":
            raise ValueError(f"{path} is an image, but {mechanism} takes a sequence: a .npy of shape (T, D)")
        return picture(_read_image(path))
    x = _read_array(path)
    if kind == "sequence":
        if x.ndim != 2 or len(x) > LONGEST:
            raise ValueError(f"{path} has shape {x.shape}, expected (T, D), T at most {LONGEST}, for {mechanism}")
        return Sentence([str(n) for n in range(len(x))], x, x.shape[1])
    if x.ndim not in (2, 3) or min(x.shape[-2:]) < LEAST:
        wanted = f"(H, W) or (C, H, W), {LEAST} pixels or more along a side"
        raise ValueError(f"{path} has shape {x.shape}, expected {wanted}, for {mechanism}")
    if x.ndim == 2:
        return picture(x)
    x = _square(x)
    return Picture(x.mean(axis=0), x, [str(n) for n in range(len(x))])


def _read_image(path):
    matplotlib()
    from matplotlib.image import imread

    try:
        pixels = imread(path)
    except Exception as error:  # of the many libraries that read images, each has its own
        raise ValueError(f"{path} cannot be read as an image: {_reason(error)}") from None
    if min(pixels.shape[:2]) < LEAST:
        raise ValueError(f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {LEAST} x {LEAST} or more")
    return pixels if pixels.ndim == 2 or pixels.shape[-1] >= 3 else pixels[..., 0]


def _read_array(path):
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiub" or x.size == 0:
        raise ValueError(f"{path} does not hold one array of real numbers")
    x = x.astype(np.float64)
    if not np.abs(x).max() <= HUGE:
        raise ValueError(f"{path} has NaN, infinity or numbers beyond {HUGE:.0e} in it")
    return x


def _reason(error):
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
