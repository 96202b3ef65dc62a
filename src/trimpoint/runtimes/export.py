"""Export a PyTorch module once, as the runtimes take it: a trace with named dynamic dimensions, a clean ONNX graph."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from trimpoint.data import as_tensors
from trimpoint.errors import ExportError, ModelError
from trimpoint.graph import bake_, grids_of, input_ranges
from trimpoint.losses import explained
from trimpoint.quiet import quiet
from trimpoint.runtimes import export_errors
from trimpoint.runtimes.base import Exported, Source
from trimpoint.runtimes.export_recurrent import AnyLength, translations
from trimpoint.signature import BATCH, Signature, TensorSpec, flatten, leaf_names, structure_of, unflatten
from trimpoint.task import call

_PREFIX = "module."
_OPSET = 20


class _Flat(nn.Module):
    """Take and return the tensors of a module's own structures one by one.

    `any_length`: recurrent layers are traced for any number of steps, by an operator that only ONNX has a form for.
    """

    def __init__(self, module: nn.Module, structure: Any, *, any_length: bool = True) -> None:
        super().__init__()
        self.module = module
        self.structure = structure
        self.any_length = any_length

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = _tensors_of(call(self.module, unflatten(self.structure, leaves)), [], "")
        # A module may hand an input on as it is; a graph needs an operator in between.
        given = {id(leaf) for leaf in leaves}
        return tuple(leaf.clone() if id(leaf) in given else leaf for leaf in flatten(outputs))


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One way to ask for dynamic dimensions: what each dimension is to be, and the sizes to trace with."""

    dims: tuple[dict[int, Any], ...]
    batch: int = 2


def export(
    module: nn.Module,
    inputs: Any,
    dynamic_dims: Mapping[str, Mapping[int, str]],
    *,
    custom_translations: Mapping[Any, Callable[..., Any]] | None = None,
    sources: Sequence[Source] = ("onnx",),
) -> Exported:
    """Export `module` in evaluation mode by `torch.export` and, where it is asked for, to ONNX from there.

    A dimension that the model cannot leave open is fixed at its size in `inputs`, with the reason in
    `Exported.notes`; the batch is then fixed at 1.

    Args:
        module: what to export; it is not changed.
        inputs: a batch of example inputs (tensor, tuple or mapping), any batch size.
        dynamic_dims: input name (see `signature.leaf_names`) → dimension → its name; `Task.dynamic_dims` gives them.
        custom_translations: `torch.ops.namespace.operator` → onnxscript function that stands for it.
        sources: the forms to make, as the runtimes declare them (`Runtime.source`).

    Raises:
        ModelError: if a parameter is not finite or the module does not run on `inputs`.
        ExportError: if an operator or the control flow cannot be exported.

    References:
        https://docs.pytorch.org/docs/stable/onnx_export.html
    """
    _check_finite(module)
    _check_projections(module)
    wrapper = _Flat(_copied(module), structure_of(inputs), any_length="program" not in sources).eval()
    names = leaf_names(inputs, "input")
    leaves = [leaf.detach().cpu() for leaf in flatten(as_tensors(inputs))]
    wanted = tuple(dict(dynamic_dims.get(name, {})) for name in names)
    outputs, dropped = _run(wrapper, leaves)

    program, example, reason = _capture(wrapper, leaves, wanted)
    fixed = _fixed(program, wanted)
    notes = [
        f"{names[leaf]}: dimension {dim} ({wanted[leaf].pop(dim)}) is fixed at {example[leaf].shape[dim]}: {reason}"
        for leaf, dim in fixed
    ]
    signature = _signature(program, example, wanted, names, outputs)
    signature = replace(signature, input_structure=structure_of(inputs), output_structure=structure_of(outputs))
    exported = Exported(
        signature=signature, notes=(*notes, *dropped), grids=grids_of(module), ranges=input_ranges(module)
    )
    if "program" in sources:
        exported = replace(exported, program=program)
    return _with_onnx(exported, program, wrapper, custom_translations or {}) if "onnx" in sources else exported


def _with_onnx(
    exported: Exported, program: ExportedProgram, wrapper: _Flat, custom: Mapping[Any, Callable[..., Any]]
) -> Exported:
    from trimpoint.runtimes import onnx_graph

    signature = exported.signature
    model = _convert(program, signature, custom)
    scopes = onnx_graph.module_scopes(model, *_owners(wrapper.module), _PREFIX)
    for values, specs in ((model.graph.input, signature.inputs), (model.graph.output, signature.outputs)):
        for value, spec in zip(values, specs, strict=True):
            onnx_graph.set_shape(value, spec.shape)
    onnx_graph.use_pooling(model)
    onnx_graph.use_transposes(model)
    scopes = onnx_graph.compact(model, scopes)
    return replace(exported, onnx=onnx_graph.serialize(model), scopes=scopes)


def _owners(module: nn.Module) -> tuple[dict[str, str], set[str]]:
    """Return the module of each parameter, and the batch normalisations, which vanish into what is before them."""
    owners = {name: name.rpartition(".")[0] for name, _ in module.named_parameters(remove_duplicate=False)}
    return owners, {path for path, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}


def _copied(module: nn.Module) -> nn.Module:
    result = copy.deepcopy(module).eval().cpu()
    bake_(result)
    for parameter in result.parameters():
        parameter.requires_grad_(False)
    return result


def _check_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise ModelError(
                f"The parameter {name!r} must be finite. Got {bad:,} of {parameter.numel():,} values that are NaN or "
                "infinite.",
                "the training diverged; start from an earlier checkpoint",
            )


def _check_projections(module: nn.Module) -> None:
    """Refuse what the exporter would write wrongly without saying so."""
    for path, part in module.named_modules():
        if isinstance(part, nn.LSTM) and part.proj_size > 0:
            raise ExportError(
                f"The layer {path!r} projects its hidden state (proj_size={part.proj_size}), which ONNX's LSTM cannot.",
                "write it as a loop over `nn.LSTMCell` and `nn.Linear`, or train it without `proj_size`",
            )


def _tensors_of(value: Any, dropped: list[str], where: str) -> Any:
    """Return nested outputs without what is no tensor; such entries of a mapping go, elsewhere they become `None`."""
    if isinstance(value, Tensor) or value is None:
        return value
    if isinstance(value, Mapping):
        items = {str(key): _tensors_of(item, dropped, f"{where}.{key}") for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None}
    if isinstance(value, (tuple, list)):
        return tuple(_tensors_of(item, dropped, f"{where}[{index}]") for index, item in enumerate(value))
    dropped.append(f"output{where}: left out, it is a {type(value).__name__} and not a tensor")
    return None


def _run(wrapper: _Flat, leaves: Sequence[Tensor]) -> tuple[Any, list[str]]:
    dropped: list[str] = []
    inputs = unflatten(wrapper.structure, [leaf.clone() for leaf in leaves])
    with torch.no_grad(), explained(inputs, "example inputs"):
        result = call(wrapper.module, inputs)
    outputs = _tensors_of(result, dropped, "")
    if not flatten(outputs):
        raise ModelError(
            f"The model must return at least one tensor. Got {type(result).__name__}.",
            "export the part that computes tensors, with `Task(core=...)`",
        )
    return outputs, dropped


def _capture(
    wrapper: _Flat, leaves: Sequence[Tensor], wanted: Sequence[Mapping[int, str]]
) -> tuple[ExportedProgram, list[Tensor], str]:
    """Trace with all wanted dimensions open, or with those that can be and the reason why others cannot."""
    found = _inferred(wrapper, leaves, wanted)
    fixed = {wanted[leaf][dim] for leaf, dim in _fixed(found[0], wanted)} if found else set()
    if found and not fixed:
        return *found, ""
    named = {name: Dim(name, min=1) for dims in wanted for name in dims.values()}
    asked = tuple({dim: named[name] for dim, name in dims.items()} for dims in wanted)
    try:
        return *_trace(wrapper, leaves, wanted, _Attempt(dims=asked)), "the model gives it one size"
    except export_errors.DimensionRefused as refused:
        reason = str(refused)
    if BATCH in fixed:
        # A fixed batch of 2 would be of no use: trace again with one sample.
        found = _inferred(wrapper, leaves, wanted, batch=1)
    none_open = _Attempt(dims=tuple({} for _ in wanted), batch=1)
    return *(found or _trace(wrapper, leaves, wanted, none_open)), reason


def _inferred(
    wrapper: _Flat, leaves: Sequence[Tensor], wanted: Sequence[Mapping[int, str]], batch: int = 2
) -> tuple[ExportedProgram, list[Tensor]] | None:
    """Trace with those wanted dimensions open that can be, but never a batch of 1; `None` where that is refused.

    Dimensions that are asked for by name would be refused where they have a limit, such as a number of positions.
    """
    dims = tuple({dim: Dim.AUTO for dim, name in each.items() if batch > 1 or name != BATCH} for each in wanted)
    try:
        return _trace(wrapper, leaves, wanted, _Attempt(dims=dims, batch=batch))
    except export_errors.DimensionRefused:
        return None


def _trace(
    wrapper: _Flat, leaves: Sequence[Tensor], wanted: Sequence[Mapping[int, str]], attempt: _Attempt
) -> tuple[ExportedProgram, list[Tensor]]:
    example = [
        _with_size(leaf, attempt.batch, [dim for dim, name in entry.items() if name == BATCH])
        for leaf, entry in zip(leaves, wanted, strict=True)
    ]
    # A size of 1 would be taken for one that broadcasts.
    example = [
        _with_size(leaf, 2, [dim for dim in opened if leaf.shape[dim] == 1])
        for leaf, opened in zip(example, attempt.dims, strict=True)
    ]
    try:
        with quiet(), torch.no_grad(), AnyLength() if wrapper.any_length else nullcontext():
            program = torch.export.export(wrapper, tuple(example), dynamic_shapes=(attempt.dims,), strict=False)
    except Exception as error:
        raise export_errors.explain_capture(error, wrapper.module) from error
    return program, example


def _with_size(leaf: Tensor, size: int, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        repeats = -(-size // max(1, leaf.shape[dim]))
        leaf = leaf.repeat_interleave(repeats, dim).narrow(dim, 0, size)
    return leaf.contiguous()


def _fixed(program: ExportedProgram, wanted: Sequence[Mapping[int, str]]) -> list[tuple[int, int]]:
    """Return input and dimension of each wanted dimension that the trace holds at one size."""
    given = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
    return [
        (leaf, dim)
        for leaf, entry in enumerate(wanted)
        for dim in entry
        if isinstance(size := shapes[leaf][dim], int) or size.node.maybe_as_int() is not None
    ]


def _convert(program: ExportedProgram, signature: Signature, custom: Mapping[Any, Callable[..., Any]]) -> Any:
    # The result is an onnx.ModelProto.
    table: dict[Callable[..., Any], Callable[..., Any]] = translations()
    for operator, translation in custom.items():
        if isinstance(operator, torch._ops.OpOverloadPacket):
            table |= {getattr(operator, overload): translation for overload in operator.overloads()}  # type: ignore[no-untyped-call]
        else:
            table[operator] = translation
    try:
        with quiet(), _sources_read_once():
            result = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                opset_version=_OPSET,
                custom_translation_table=table,
                verbose=False,
            )
            if result is None:
                raise ExportError("The ONNX exporter returned no model.")
            return result.model_proto
    except torch.onnx.errors.OnnxExporterError as error:
        raise export_errors.explain_conversion(error, _PREFIX) from error


@contextmanager
def _sources_read_once() -> Iterator[None]:
    """Remember what the exporter reads in the sources of its translations, which it would parse anew in each export."""
    from onnxscript import TracedOnnxFunction

    read = vars(TracedOnnxFunction).get("function_ir")
    if not isinstance(read, property):
        yield
        return
    TracedOnnxFunction.function_ir = _remembered(read)
    try:
        yield
    finally:
        TracedOnnxFunction.function_ir = read


@cache
def _remembered(read: property) -> property:
    return property(cache(read.fget))  # type: ignore[arg-type]


def _unique(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        free = name if name not in taken else f"{name}_out"
        while free in taken or free in result:
            free += "_"
        result.append(free)
    return result


def _signature(
    program: ExportedProgram,
    example: Sequence[Tensor],
    wanted: Sequence[Mapping[int, str]],
    names: Sequence[str],
    outputs: Any,
) -> Signature:
    """Return inputs and outputs of a trace; open dimensions have their wanted names, derived ones their formula."""
    nodes = {node.name: node for node in program.graph.nodes}
    symbols: dict[str, str] = {}
    inputs = []
    for name, given, leaf, entry in zip(names, program.graph_signature.user_inputs, example, wanted, strict=True):
        value = nodes[str(given)].meta["val"]
        for dim, label in entry.items():
            symbols.setdefault(str(value.shape[dim]), label)
        shape = tuple(entry.get(dim, int(size)) for dim, size in enumerate(leaf.shape))
        inputs.append(TensorSpec(name=name, dtype=_dtype_name(leaf), shape=shape))
    found = []
    for name, made in zip(
        _unique(leaf_names(outputs, "output"), names), program.graph_signature.user_outputs, strict=True
    ):
        value = nodes[str(made)].meta["val"]
        sizes = [export_errors.substitute(str(size), symbols) for size in value.shape]
        shape = tuple(int(size) if size.isdecimal() else size for size in sizes)
        found.append(TensorSpec(name=name, dtype=_dtype_name(value), shape=shape))
    return Signature(inputs=tuple(inputs), outputs=tuple(found))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
