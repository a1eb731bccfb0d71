"""Pictures, for those who have matplotlib: pip install 'refattn[plot]'."""

from refattn.core import expect


def draw_mask(mask, queries, keys, ax=None, *, offset=0):
    """Draw a mask of refattn.masks, a row per query, dark where the key takes part: see Mask.array for the sizes.

    It is drawn into `ax`, or into a new figure. A mask that is not the same for all items and heads makes one picture
    for each, side by side in a new figure. Returns the Axes; a list of them, if there are several.
    """
    pictures = list(mask.pictures(queries, keys, offset))
    one = len(pictures) == 1
    expect(one or ax is None, "plot.draw_mask: ax", ax, f"None, for {len(pictures)} pictures")
    if ax is None:
        size = 4 * len(pictures), 4
        _, ax = _pyplot().subplots(1, len(pictures), figsize=size, squeeze=False, layout="constrained")
        ax = ax[0, 0] if one else list(ax[0])
    for axes, (title, allowed) in zip([ax] if one else ax, pictures, strict=True):
        _draw(axes, allowed, offset)
        axes.set_title(title or repr(mask), fontsize="medium", wrap=True)
    return ax


def _draw(axes, allowed, offset):
    queries, keys = allowed.shape
    edges = -0.5, keys - 0.5, offset + queries - 0.5, offset - 0.5
    axes.imshow(allowed, cmap="Blues", vmin=-0.1, vmax=1.2, extent=edges, interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"matplotlib cannot be imported ({error}): pip install 'refattn[plot]'") from error
    return pyplot
