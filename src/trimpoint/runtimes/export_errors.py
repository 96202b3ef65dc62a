"""Say in one message why a model cannot be exported: the operator, the module, the source line, the ways out."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from trimpoint.errors import ExportError, TrimpointError

WAYS_OUT = (
    "translate the operator with `custom_translations={torch.ops.namespace.operator: onnxscript_function}`, export "
    "only the part that does without it with `Task(core=...)`, or choose another runtime"
)
_TORCH = str(Path(torch.__file__).parent)
_DATA_DEPENDENT = ("data-dependent", "data dependent", "Dynamic control flow", ".item()")


class DimensionRefused(TrimpointError):  # noqa: N818
    """A dimension that was to stay open and that the model fixes."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain_capture(error: Exception, module: nn.Module) -> TrimpointError:
    """Return what to raise for an error of `torch.export`.

    Args:
        error: as raised.
        module: the module that was traced; frames of its submodules tell where it happened.
    """
    text = str(error)
    if "Constraints violated" in text or "specialized" in text:
        return DimensionRefused(_constraint(text))
    path, line = _place(error, module)
    at = (f" in module {path!r}" if path else "") + (f", at {line}" if line else "")
    chain = list(_chain(error))
    if any(isinstance(link, GuardOnDataDependentSymNode) for link in chain) or any(
        word in str(link) for link in chain for word in _DATA_DEPENDENT
    ):
        return ExportError(
            f"The control flow of the model depends on its data{at}: {first_line(error)}",
            "a graph has one path: use `torch.where`, or `torch.cond` for both branches; or export only a part with "
            "`Task(core=...)` and keep the branch in `Task(predict=...)`",
        )
    if path and isinstance(module.get_submodule(path), nn.RNNBase) and "FakeTensor" in text:
        return ExportError(
            f"The model cannot be traced{at}: a recurrent layer reads packed sequences.",
            "pad the sequences instead, and take the outputs at their last steps",
        )
    return ExportError(
        f"The model cannot be traced{at}: {type(error).__name__}: {first_line(error)}",
        "change that line to what `torch.export` supports, or export only a part with `Task(core=...)`",
    )


def explain_conversion(error: Exception, prefix: str) -> ExportError:
    """Return what to raise for an error of the conversion to ONNX.

    Args:
        error: as raised.
        prefix: what stands before each module path.
    """
    chain = list(_chain(error))
    node = next((found for link in chain if (found := _node_of(link)) is not None), None)
    reason = first_line(chain[-1])
    if node is None:
        return ExportError(f"The model cannot be converted to ONNX: {reason}", WAYS_OUT)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).removeprefix("L['self'].").removeprefix(prefix.rstrip(".")).lstrip(".") if stack else ""
    line = _user_line(str(node.meta.get("stack_trace") or ""))
    where = (f" in module {path!r}" if path else "") + (f", at {line}" if line else "")
    return ExportError(f"The operator `{node.target}` cannot be exported to ONNX{where}: {reason}", WAYS_OUT)


def substitute(formula: str, symbols: Mapping[str, str]) -> str:
    """Return a dimension's formula with its symbols under their names.

    Example:
        >>> substitute("2*s7 + 1", {"s7": "length"})
        '2*length + 1'
    """
    return re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), formula)


def _constraint(text: str) -> str:
    """Return the line of a constraint violation that says what the model made of the dimension."""
    lines = [line.strip(" -\t") for line in text.splitlines() if line.strip()]
    useful = [line for line in lines if "specialized" in line or "Not all values" in line or "must be" in line]
    return re.sub(r"\s+", " ", (useful or lines)[0]).partition(". If you")[0].rstrip(".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def _node_of(error: BaseException) -> fx.Node | None:
    """Return the graph node that the exporter was translating, from its frames."""
    found = [frame.f_locals.get("node") for frame, _ in _frames(error)]
    return next((node for node in reversed(found) if isinstance(node, fx.Node)), None)


def _place(error: BaseException, module: nn.Module) -> tuple[str, str]:
    """Return the path of the innermost module that was running and the innermost source line outside of torch."""
    paths = {id(part): path for path, part in module.named_modules()}
    path, line = "", ""
    for link in reversed(list(_chain(error))):
        for frame, number in _frames(link):
            path = paths.get(id(frame.f_locals.get("self")), path)
            name = frame.f_code.co_filename
            if paths.get(id(frame.f_locals.get("self"))) is not None and not name.startswith(_TORCH):
                line = f"{name}:{number}"
        if path or line:
            break
    return path, line


def _user_line(stack: str) -> str:
    """Return `file:line` and the source of the innermost frame outside of torch, from a printed stack."""
    found = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*([^\n]*)', stack)
    own = [entry for entry in found if not entry[0].startswith(_TORCH)] or found
    return f"{own[-1][0]}:{own[-1][1]} `{own[-1][2].strip()}`" if own else ""
