"""Numbers of heads that the code of a model reads from attributes of its modules, and what they become.

Code such as `x.view(batch, length, self.num_heads, -1)` must know when heads have gone. Which module gives a tensor its
shape is known from the trace; which of its attributes state that shape is found by their values and tried out, first
those whose names say so. Objects that modules share, such as a configuration, are never touched.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

from torch import nn

from trimpoint.graph.edits import AttributeEdit, is_size
from trimpoint.parts import Group

MOST_TRIALS = 48
"""How many sets of attributes are tried for some groups, at most."""

_HEADS = re.compile(r"(?<!a)head")
_SIZE_OF_ONE = re.compile(r"(?<!all_)heads?_(dim|size|channels|width|features)|per_head|dim_head")
_NO_SIZE = re.compile(r"(^|_)(idx|index|id|ids|layer|layers|depth|level|stage|step|steps|seed)(_|$)")
_WIDTH = re.compile(r"dim|size|embed|width|channels|features|inner|hidden|split")
_Key = tuple[type[nn.Module], str]
_Found = dict[_Key, list[AttributeEdit]]


def head_sizes(module: nn.Module, chosen: Mapping[str, tuple[Group, Sequence[int]]]) -> Iterator[list[AttributeEdit]]:
    """Yield sets of attributes that may state the numbers and widths of the heads that are left, likely ones first.

    Modules of one class are treated alike. Where none of the groups has heads, the only set is the empty one.

    Args:
        module: the model.
        chosen: group name → the group and the units that go.
    """
    left: dict[str, dict[int, int]] = {}
    for group, units in chosen.values():
        for place in group.places:
            sizes = left.setdefault(place.path, {})
            for size, count in place.sizes:
                sizes[size] = sizes.get(size, size) - count * len(units)
    own: _Found = {}
    for path, sizes in left.items():
        _collect(module.get_submodule(path), path, sizes, own)
    wide = {key: list(edits) for key, edits in own.items()}
    for path, sizes in left.items():
        for near, part in _around(module, path):
            if near not in left:
                _collect(part, near, sizes, wide)
    seen = set()
    for found, most in ((own, MOST_TRIALS - 4), (wide, 4)):
        for keys in islice(_sets(found), most):
            edits = tuple(edit for key in keys for edit in found[key])
            if edits not in seen:
                seen.add(edits)
                yield list(edits)


def says_heads(name: str) -> bool:
    """Return whether an attribute of this name counts heads, or gives the width of all of them."""
    return bool(_HEADS.search(name)) and not _SIZE_OF_ONE.search(name)


def _collect(part: nn.Module, path: str, sizes: Mapping[int, int], found: _Found) -> None:
    for name, value in vars(part).items():
        if is_size(part, name) and not _NO_SIZE.search(name) and isinstance(value, int) and sizes.get(value, 0) >= 1:
            found.setdefault((type(part), name), []).append(AttributeEdit(path, name, sizes[value]))


def _around(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the parent and the children of the module at `path`."""
    if path:
        parent = path.rpartition(".")[0]
        yield parent, module.get_submodule(parent)
    for name, child in module.get_submodule(path).named_children():
        yield f"{path}.{name}".lstrip("."), child


def _sets(found: _Found) -> Iterator[tuple[_Key, ...]]:
    """Yield sets of attributes: those named after heads, widths too, none, each of these and some others, all sets."""
    heads = [key for key in found if says_heads(key[1])]
    widths = [key for key in found if key in heads or (_WIDTH.search(key[1]) and not _SIZE_OF_ONE.search(key[1]))]
    bases: list[list[_Key]] = [heads, widths, []]
    for count in range(len(found) + 1):
        for base in bases:
            rest = [key for key in found if key not in base]
            yield from (tuple(key for key in found if key in base or key in more) for more in combinations(rest, count))
