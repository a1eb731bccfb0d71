"""The words every file in refattn uses: shapes, trees, and the record of one mechanism."""

from typing import NamedTuple

from refattn.shapes import Array, Bools, DtypeError, Ints, Shaped, ShapeError, expect, shaped

__all__ = [
    "About", "Array", "Bools", "Call", "DtypeError", "Ints", "ShapeError", "Shaped",
    "expect", "leaves", "shaped", "tree_map",
]  # fmt: skip


class Call(NamedTuple):
    """Everything needed to call a mechanism once: forward(*args, **options)."""

    args: tuple
    options: dict


class About(NamedTuple):
    """What a mechanism's own file says of it, beyond its code and its docstring."""

    weights: str | None = None  # the Saved field that is the attention map: plotted, and range-checked
    laws: tuple = ()  # names in refattn.oracle.laws.DECLARED that this mechanism obeys
    witnesses: tuple = ()  # who else confirms the forward: "authors' code", "framework", "definition", "relation"
    exempt: tuple = ()  # pairs (universal law, why it cannot hold here)


# --- trees: arrays in nested (named) tuples; None is a tree without leaves ----------------------------------


def leaves(tree, path=""):
    """Yield (path, array) for every array in a nest of tuples: ("1.w1", ...)."""
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", range(len(tree)))
        for name, child in zip(names, tree, strict=True):
            yield from leaves(child, f"{path}.{name}" if path else str(name))
    elif tree is not None:
        yield path, tree


def tree_map(function, tree, *others):
    """Apply `function` leaf by leaf to trees of one structure; keep the structure."""
    if tree is None:
        return None
    if not isinstance(tree, tuple):
        return function(tree, *others)
    children = [tree_map(function, *nodes) for nodes in zip(tree, *others, strict=True)]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
