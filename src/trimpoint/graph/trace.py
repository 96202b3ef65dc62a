"""Tracing: a model's ATen graph with the paths of its modules and the owners of its parameters."""

import copy
import traceback
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from trimpoint.errors import TraceError
from trimpoint.graph.masks import end_schedules_
from trimpoint.losses import call
from trimpoint.quiet import quiet
from trimpoint.signature import flatten, structure_of, unflatten

_HINT = (
    "give the part that can be exported as `Task(core=...)`, or rewrite the line without control flow that depends on "
    "tensor values"
)
_CACHE_HINT = "ask the model not to return its cache of keys and values: `model.config.use_cache = False`"


@dataclass(frozen=True, eq=False)
class Trace:
    """A model as one graph of ATen operators.

    Args:
        program: the exported program, taken in evaluation mode at batch ≥ 2.
        owners: placeholder of a parameter or buffer → every (module path, name) under which the model holds it, the
            first one standing for all.
        modules: node → path of the module whose `forward` made it; the root is `""`.
        inputs: the example inputs that were used.
        module: the deep copy that was exported, in evaluation mode.
    """

    program: ExportedProgram
    owners: Mapping[str, tuple[tuple[str, str], ...]]
    modules: Mapping[str, str]
    inputs: Any
    module: nn.Module


def trace(module: nn.Module, inputs: Any) -> Trace:
    """Export a deep copy of `module` once, in evaluation mode.

    Args:
        module: the model; it is not changed.
        inputs: one batch, a tensor, a tuple or a dict as for `trimpoint.task.call`. A batch of one is doubled, so that
            no size 1 is mistaken for broadcasting.

    Raises:
        TraceError: if the model does not run on the inputs, or cannot be exported; it names the module and the line.
    """
    original = module
    module = copy.deepcopy(module).eval()
    end_schedules_(module)
    inputs = doubled(inputs)
    try:
        with torch.no_grad():
            outputs = call(module, inputs)
    except Exception as error:
        raise TraceError(
            f"The model {type(original).__name__} does not run on the example inputs: {_where(error, module)}",
            "check the shapes and types of the inputs, and that it takes a batch of two",
        ) from error
    try:
        program = _export(module, inputs)
    except Exception as error:
        hint = _CACHE_HINT if _has_cache(outputs) or "Cache" in str(error) else _HINT
        raise TraceError(
            f"The model {type(original).__name__} could not be traced: {_where(error, module)}", hint
        ) from error
    return Trace(program, _owners(program, module), _modules(program), inputs, module)


def _has_cache(outputs: Any) -> bool:
    found = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    return any(type(value).__name__.endswith("Cache") for value in found)


def doubled(inputs: Any) -> Any:
    """Return inputs whose first dimension is 1 throughout as a batch of two; others as they are."""
    leaves = flatten(inputs)
    if leaves and all(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1 for leaf in leaves):
        return unflatten(structure_of(inputs), [torch.cat([leaf, leaf]) for leaf in leaves])
    return inputs


@contextmanager
def _plain_attention() -> Any:
    """Switch PyTorch's fused transformer layer off, which would hide the layer's operators."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _export(module: nn.Module, inputs: Any) -> ExportedProgram:
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    if not isinstance(args, (tuple, list)):
        args = (args,)
    with quiet(), _plain_attention(), torch.no_grad():
        return torch.export.export(module, tuple(args), kwargs, strict=False)


def _owners(program: ExportedProgram, module: nn.Module) -> dict[str, tuple[tuple[str, str], ...]]:
    held: dict[int, list[tuple[str, str]]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                held.setdefault(id(tensor), []).append((path, name))
    signature = program.graph_signature
    owners = {}
    for placeholder, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        path, _, name = target.rpartition(".")
        owners[placeholder] = tuple(held[id(getattr(module.get_submodule(path), name))])
    return owners


def _modules(program: ExportedProgram) -> dict[str, str]:
    return {node.name: module_path(node) for node in program.graph.nodes}


def module_path(node: Node) -> str:
    """Return the path of the module whose `forward` made `node`; `""` for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return path.removeprefix("L['self'].").removeprefix("L['self']").split("@")[0]


def _where(error: BaseException, module: nn.Module) -> str:
    """Describe an error by the line of user code and the module that it came from."""
    paths = {id(part): path for path, part in module.named_modules()}
    library = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    place, line, owner = "", "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        part = _self(frame)
        if part is not None and paths.get(id(part)):
            owner = f" in the module `{paths[id(part)]}` ({type(part).__name__})"
        if not frame.f_code.co_filename.startswith(library):
            place = f" at {Path(frame.f_code.co_filename).name}:{number}"
            line = traceback.FrameSummary(frame.f_code.co_filename, number, frame.f_code.co_name).line or ""
    message = str(error).strip().splitlines()[0] if str(error).strip() else ""
    source = f" in `{line.strip()}`" if line else ""
    return f"{type(error).__name__}: {message}{owner}{place}{source}"


def _self(frame: FrameType) -> nn.Module | None:
    part = frame.f_locals.get("self")
    return part if isinstance(part, nn.Module) else None
