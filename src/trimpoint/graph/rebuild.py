"""Saving an edited model as weights and edits, and making it again from the caller's own factory.

Nothing that a file names is imported, and no pickle is read: the file holds tensors (safetensors) and edits from a
closed vocabulary.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph.codebooks import wrong_codebooks
from trimpoint.graph.edits import Edit, apply_edits_, edits_from_data, edits_to_data
from trimpoint.graph.grids import wrong_scales
from trimpoint.graph.input_grids import wrong_ranges

WEIGHTS, STRUCTURE, VERSION = "weights.safetensors", "structure.json", 1


def save_structure(directory: Path | str, module: nn.Module, edits: Sequence[Edit]) -> None:
    """Write `weights.safetensors` and `structure.json` of an edited module.

    Args:
        directory: where to write; made if it does not exist.
        module: the edited module.
        edits: that were applied to it, in their order.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _state(module)
    safetensors.torch.save_file(tensors, directory / WEIGHTS)
    data = {"version": VERSION, "edits": edits_to_data(edits), "tied": aliases}
    (directory / STRUCTURE).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor of the state once, and tied name → the name it is saved under."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ArtifactError(f"The state {name!r} of the module must be a tensor. Got {type(tensor).__name__}.")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def rebuild(directory: Path | str, factory: Callable[[], nn.Module]) -> nn.Module:
    """Make the module that `save_structure` wrote, from the caller's factory of the unmodified model.

    Args:
        directory: that holds `weights.safetensors` and `structure.json`.
        factory: makes the unmodified architecture; its weights do not matter.

    Returns:
        The factory's module, edited and with the saved weights.

    Raises:
        ArtifactError: if the files are not sound, or the factory makes another architecture.
    """
    directory = Path(directory)
    data = _read_structure(directory / STRUCTURE)
    edits = edits_from_data(data["edits"])
    module = factory()
    if not isinstance(module, nn.Module):
        raise ArtifactError(f"The factory must return a torch.nn.Module. Got {type(module).__name__}.")
    hint = "the factory must make the architecture that was compressed"
    try:
        module = apply_edits_(module, edits)
    except SurgeryError as error:
        raise ArtifactError(f"The edits do not fit what the factory makes: {error.message}", hint) from error
    state = _read_weights(directory / WEIGHTS)
    for name, source in data["tied"].items():
        if source not in state:
            raise ArtifactError(f"The tensor {name!r} is tied to {source!r}, which {WEIGHTS} does not hold.")
        state[name] = state[source]
    problems = _mismatches(module.state_dict(keep_vars=True), state, data["tied"])
    if problems:
        raise ArtifactError("The weights do not fit what the factory makes:\n" + "\n".join(problems), hint)
    module.load_state_dict(state, strict=True)
    if wrong := wrong_scales(module) + wrong_ranges(module):
        raise ArtifactError(f"The scales of {wrong[0]!r} must be finite and positive.")
    if wrong := wrong_codebooks(module):
        raise ArtifactError(f"The codes of {wrong[0]!r} must stand for values, and its values be finite.")
    return module


def _read_structure(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or set(data) != {"version", "edits", "tied"}:
        raise ArtifactError(f"{path} must hold version, edits and tied.")
    if data["version"] != VERSION:
        raise ArtifactError(f"{path} must have version {VERSION}. Got {data['version']!r}.", "use the newer trimpoint")
    tied = data["tied"]
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise ArtifactError(f"`tied` in {path} must map names to names.")
    return data


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _mismatches(own: Mapping[str, Any], state: Mapping[str, Tensor], tied: Mapping[str, str]) -> list[str]:
    problems = [f"{name}: only in the file" for name in state if name not in own]
    problems += [f"{name}: only in the model" for name in own if name not in state]
    for name in own:
        if name not in state:
            continue
        if own[name].shape != state[name].shape:
            problems.append(f"{name}: shape {list(own[name].shape)} expected, {list(state[name].shape)} found")
        elif own[name].dtype != state[name].dtype:
            problems.append(f"{name}: type {own[name].dtype} expected, {state[name].dtype} found")
    problems += [
        f"{name}: tied to {other} when it was saved"
        for name, other in tied.items()
        if name in own and other in own and own[name] is not own[other]
    ]
    first: dict[int, str] = {}
    for name in own:
        other = first.setdefault(id(own[name]), name)
        if tied.get(name, name) != tied.get(other, other):
            problems.append(f"{name}: not tied to {other} when it was saved")
    return [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
