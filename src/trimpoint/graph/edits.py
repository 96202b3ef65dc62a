"""Structural edits as data: a closed vocabulary that is applied in place and replayed on an unmodified copy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import ArtifactError, SurgeryError, suggest
from trimpoint.graph.bypass import PLAIN, Bypass
from trimpoint.graph.codebooks import check_codebook, share_stored_
from trimpoint.graph.grids import check_grid, put_stored_grid_
from trimpoint.graph.input_grids import InputGrid, check_input_grid, put_input_on_grid_
from trimpoint.graph.layers import check_layer, layer_from_data
from trimpoint.graph.masks import check_schedule, mask_, schedule_from_data

_LARGEST = 1 << 31


@dataclass(frozen=True)
class BypassEdit:
    """Replace the module at `path`, wherever it is used, by a `Bypass` that returns `structure`."""

    path: str
    structure: Any = "first"


@dataclass(frozen=True)
class ResizeEdit:
    """Keep only the positions `keep` of dimension `dim` of a parameter or buffer (tied ones follow)."""

    path: str
    parameter: str
    dim: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class AttributeEdit:
    """Set an attribute that states a size, see `is_size`.

    That is safe for edits from a file that is not trusted: all it can do is to give a number that a module of the
    caller's own already holds, under a public name, another value of the same kind. It adds no attribute, and reaches
    no method, no class, no tensor, and nothing that modules share, such as a configuration.
    """

    path: str
    name: str
    value: int | tuple[int, ...]


@dataclass(frozen=True)
class ReplaceEdit:
    """Replace the module at `path`, wherever it is used, by `layer`: see `trimpoint.graph.layers`."""

    path: str
    layer: Mapping[str, Any]


@dataclass(frozen=True)
class MaskEdit:
    """Hold weights of a parameter at zero: see `trimpoint.graph.masks`. Which ones is part of the module's state."""

    path: str
    parameter: str
    schedule: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class GridEdit:
    """Hold a parameter on a grid: see `trimpoint.graph.grids`. Its scales are part of the module's state."""

    path: str
    parameter: str
    grid: Mapping[str, Any]


@dataclass(frozen=True)
class InputGridEdit:
    """Round what the module at `path`, and those at `also`, read: see `trimpoint.graph.input_grids`.

    The ends of the range are part of the module's state; `zero`: the least level is 0 and stays it.
    """

    path: str
    also: tuple[str, ...]
    bits: int
    zero: bool


@dataclass(frozen=True)
class CodebookEdit:
    """Let weights share values: see `trimpoint.graph.codebooks`. Codes and values are part of the module's state."""

    path: str
    parameter: str
    codebook: Mapping[str, int]


Edit = BypassEdit | ResizeEdit | AttributeEdit | ReplaceEdit | MaskEdit | GridEdit | InputGridEdit | CodebookEdit
_KINDS: dict[str, type[Any]] = {
    "bypass": BypassEdit,
    "resize": ResizeEdit,
    "attribute": AttributeEdit,
    "replace": ReplaceEdit,
    "mask": MaskEdit,
    "grid": GridEdit,
    "input-grid": InputGridEdit,
    "codebook": CodebookEdit,
}
_HELD: dict[str, tuple[str, Callable[[Any], str]]] = {
    "mask": ("schedule", check_schedule),
    "grid": ("grid", check_grid),
    "codebook": ("codebook", check_codebook),
}
"""Kind of what holds a parameter → the entry that describes it, and what says what is wrong with that."""
_FIELDS = {kind: {field.name for field in fields(edit)} - {"path"} for kind, edit in _KINDS.items()}


def edits_to_data(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Return edits as JSON data; runs of kept positions are written as `[first, last + 1]`.

    Example:
        >>> edits_to_data([ResizeEdit("conv", "weight", 0, (0, 1, 2, 5))])
        [{'edit': 'resize', 'path': 'conv', 'parameter': 'weight', 'dim': 0, 'keep': [[0, 3], [5, 6]]}]
    """
    names = {kind: name for name, kind in _KINDS.items()}
    data = []
    for edit in edits:
        entry = {"edit": names[type(edit)], **asdict(edit)}
        if isinstance(edit, ResizeEdit):
            entry["keep"] = _runs(edit.keep)
        elif isinstance(edit, AttributeEdit) and isinstance(edit.value, tuple):
            entry["value"] = list(edit.value)
        data.append(entry)
    return data


def _runs(keep: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for position in keep:
        if runs and runs[-1][1] == position:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return runs


def edits_from_data(data: Any) -> list[Edit]:
    """Read edits back.

    Raises:
        ArtifactError: naming the first entry that is no edit.
    """
    if not isinstance(data, list):
        raise ArtifactError(f"The edits must be a list. Got {type(data).__name__}.")
    return [_edit(entry, f"edit {index}") for index, entry in enumerate(data)]


def _edit(entry: Any, where: str) -> Edit:
    kind = entry.get("edit") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        hint = suggest(kind, list(_KINDS)) if isinstance(kind, str) else None
        raise ArtifactError(f"The {where} must be one of {', '.join(_KINDS)}. Got {entry!r}.", hint)
    if set(entry) != {"edit", "path", *_FIELDS[kind]} or not isinstance(entry["path"], str):
        needed = ", ".join(sorted(_FIELDS[kind]))
        raise ArtifactError(f"The {where} ({kind}) must have path, {needed}. Got {sorted(entry)}.")
    if kind == "bypass":
        _check_structure(entry["structure"], where)
        return BypassEdit(entry["path"], entry["structure"])
    if kind == "resize":
        return _resize(entry, where)
    if kind == "replace":
        if problem := check_layer(entry["layer"]):
            raise ArtifactError(f"The {where} makes no layer: {problem}.")
        return ReplaceEdit(entry["path"], entry["layer"])
    if kind in _HELD:
        content, check = _HELD[kind]
        problem = check(entry[content])
        if not isinstance(entry["parameter"], str):
            problem = "a parameter is named by a word"
        if problem:
            raise ArtifactError(f"The {where} makes no {kind}: {problem}.")
        return cast(Edit, _KINDS[kind](**{key: value for key, value in entry.items() if key != "edit"}))
    if kind == "input-grid":
        if problem := check_input_grid(entry):
            raise ArtifactError(f"The {where} makes no grid: {problem}.")
        return InputGridEdit(entry["path"], tuple(entry["also"]), entry["bits"], entry["zero"])
    name, value = entry["name"], entry["value"]
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        raise ArtifactError(f"The {where} sets {name!r}.", "only public attributes that state a size can be set")
    if not _counts(value) and not (isinstance(value, list) and value and all(map(_counts, value))):
        raise ArtifactError(f"The value of {where} must be a whole number ≥ 1 or a list of them. Got {value!r}.")
    return AttributeEdit(entry["path"], name, tuple(value) if isinstance(value, list) else value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _counts(value: Any) -> bool:
    return _whole(value) and 1 <= value < _LARGEST


def is_size(module: nn.Module, name: str) -> bool:
    """Return whether an attribute can be edited: public, the module's own, a whole number ≥ 1 or a tuple of them."""
    value = None if name.startswith("_") else vars(module).get(name)
    return _counts(value) or (type(value) is tuple and len(value) > 0 and all(map(_counts, value)))


def _set_size(module: nn.Module, edit: AttributeEdit) -> None:
    old = vars(module)[edit.name] if is_size(module, edit.name) else None
    alike = type(old) is type(edit.value) and (not isinstance(old, tuple) or len(old) == len(cast(Any, edit.value)))
    if not alike:
        raise SurgeryError(f"The module `{edit.path}` has no attribute {edit.name!r} that may be set.")
    setattr(module, edit.name, edit.value)


def _resize(entry: Mapping[str, Any], where: str) -> ResizeEdit:
    runs = entry["keep"]
    sound = isinstance(runs, list) and all(
        isinstance(run, list) and len(run) == 2 and all(map(_whole, run)) and run[0] < run[1] <= 1 << 31 for run in runs
    )
    if not sound or not _whole(entry["dim"]) or not isinstance(entry["parameter"], str):
        raise ArtifactError(f"The {where} must keep runs [first, last + 1] of a dimension ≥ 0. Got {entry!r}.")
    keep = tuple(position for first, last in runs for position in range(first, last))
    return ResizeEdit(entry["path"], entry["parameter"], entry["dim"], keep)


def _check_structure(structure: Any, where: str) -> None:
    if structure is None or structure == "first":
        return
    kind, content = (
        next(iter(structure.items())) if isinstance(structure, Mapping) and len(structure) == 1 else ("", None)
    )
    if kind in ("tuple", "list") and isinstance(content, list):
        for item in content:
            _check_structure(item, where)
    elif kind == "dict" and isinstance(content, Mapping):
        for item in content.values():
            _check_structure(item, where)
    elif not (
        (kind == "value" and isinstance(content, PLAIN))
        or (kind == "argument" and (isinstance(content, str) or _whole(content)))
    ):
        raise ArtifactError(f"The structure of {where} is none that a bypassed block returns. Got {structure!r}.")


def apply_edits_(module: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """Apply edits in their order, in place.

    Parameters keep their identity, so tied ones stay tied. Those of a layer that replaces another are not initialised.

    Returns:
        The module; another one where the whole of it was replaced.

    Raises:
        SurgeryError: if an edit does not fit the module.
    """
    for edit in edits:
        target = _get(module, edit.path)
        if isinstance(edit, BypassEdit):
            if target is module:
                raise SurgeryError("The whole model cannot be bypassed.", "name one of its blocks")
            replace_everywhere_(module, edit.path, Bypass(edit.structure, target))
        elif isinstance(edit, ReplaceEdit):
            module = replace_everywhere_(module, edit.path, layer_from_data(edit.layer, target))
        elif isinstance(edit, ResizeEdit):
            resize_(target, edit)
        elif isinstance(edit, MaskEdit):
            mask_(target, edit.parameter, None, schedule_from_data(edit.schedule))
        elif isinstance(edit, GridEdit):
            put_stored_grid_(target, edit.parameter, edit.grid)
        elif isinstance(edit, InputGridEdit):
            grid = InputGrid(0.0 if edit.zero else -1.0, 1.0, edit.bits)
            put_input_on_grid_([target, *(_get(module, path) for path in edit.also)], grid)
        elif isinstance(edit, CodebookEdit):
            share_stored_(target, edit.parameter, edit.codebook)
        else:
            _set_size(target, edit)
    return module


def _get(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        names = [name for name, _ in module.named_modules() if name]
        raise SurgeryError(f"The model has no module `{path}`.", suggest(path, names)) from error


def replace_everywhere_(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """Put `replacement` wherever the module at `path` is held; return the model, which is another one for the root.

    Raises:
        SurgeryError: if there is no such module.
    """
    old = _get(module, path)
    replacement.train(old.training)
    if old is module:
        return replacement
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = replacement
    return module


def resize_(module: nn.Module, edit: ResizeEdit) -> None:
    """Keep some positions of a parameter or buffer of `module`; its identity, type and `requires_grad` stay.

    Raises:
        SurgeryError: if the module has no such tensor, dimension or position.
    """
    tensor = cast(Tensor | None, module._parameters.get(edit.parameter, module._buffers.get(edit.parameter)))
    name = f"{edit.path}.{edit.parameter}".lstrip(".")
    if tensor is None:
        raise SurgeryError(f"The model has no parameter or buffer `{name}`.")
    if edit.dim >= tensor.dim() or not edit.keep or max(edit.keep) >= tensor.shape[edit.dim]:
        raise SurgeryError(
            f"`{name}` has shape {list(tensor.shape)}: of dimension {edit.dim} at least one and at most its positions "
            f"can be kept. Got {len(edit.keep)} positions up to {max(edit.keep, default=-1)}."
        )
    index = torch.tensor(edit.keep, device=tensor.device)
    tensor.data = tensor.data.index_select(edit.dim, index)
    tensor.grad = None
