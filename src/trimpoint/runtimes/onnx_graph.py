"""Clean and compact ONNX files: no debris, short names, nothing stored twice, the same bytes every time.

This module needs `onnx` (the full installation); what opens an artifact does not import it.
"""

import ast
import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import count

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

_DIGITS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SCOPES = "pkg.torch.onnx.name_scopes"


def module_scopes(model: ModelProto, owners: Mapping[str, str], folded: Set[str], prefix: str) -> dict[str, str]:
    """Return the module that each node came from, as the dynamo exporter recorded it.

    The exporter books a convolution that has taken in its batch normalisation under the latter; such a node goes to
    the module that owns its weight.

    Args:
        model: as exported, its metadata still in it.
        owners: parameter name → module path, without `prefix`.
        folded: paths of the modules that can be folded into another.
        prefix: what the exporter puts before each path and parameter name.
    """
    scopes = {}
    for node in model.graph.node:
        recorded = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
        stack = [str(name) for name in ast.literal_eval(recorded)]
        # The first entry is the root, the last the operator itself.
        inside = [name.removeprefix(prefix) for name in stack[1:-1] if name.startswith(prefix)]
        owner = next((owners[n] for i in node.input if (n := i.removeprefix(prefix)) in owners), None)
        recorded_path = inside[-1] if inside else ""
        # A parent may use its child's weight without calling the child, as multi-head attention does.
        if owner is not None and (recorded_path in {"", *folded} or owner.startswith(recorded_path + ".")):
            scopes[node.name] = owner
        elif inside:
            scopes[node.name] = recorded_path
    return scopes


def set_shape(value: ValueInfoProto, shape: Sequence[int | str]) -> None:
    """Give an input or output, in place, the sizes and the names of its dimensions."""
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size


def strip(model: ModelProto) -> None:
    """Remove in place what no runtime reads: doc strings, metadata, recorded shapes, unused operator sets."""
    for graph in _graphs(model.graph):
        for node in graph.node:
            _strip_node(node)
        for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
            item.doc_string = ""
            del item.metadata_props[:]
        del graph.value_info[:]
        del graph.quantization_annotation[:]
        del graph.metadata_props[:]
        graph.doc_string = ""
        graph.name = "g"
    for function in model.functions:
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
        del function.metadata_props[:]
        del function.value_info[:]
        function.doc_string = ""
    del model.metadata_props[:]
    for field in ("doc_string", "producer_name", "producer_version", "domain"):
        model.ClearField(field)
    used = {node.domain for graph in _graphs(model.graph) for node in graph.node}
    used |= {entry.domain for function in model.functions for entry in function.opset_import}
    kept = [entry for entry in model.opset_import if entry.domain in used | {"", "ai.onnx"}]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def use_pooling(model: ModelProto) -> None:
    """Write means over the height and width of an image as `GlobalAveragePool`, in place.

    Both are the same function; only the latter has kernels in the layouts and in the int8 of convolutions.
    """
    known = {value.name: value.type.tensor_type.shape for value in (*model.graph.value_info, *model.graph.input)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in constants:
            continue
        keep = all(attribute.i == 1 for attribute in node.attribute if attribute.name == "keepdims")
        axes = sorted(int(axis) % 4 for axis in numpy_helper.to_array(constants[node.input[1]]).ravel())
        if keep and axes == [2, 3] and node.input[0] in known and len(known[node.input[0]].dim) == 4:
            node.op_type = "GlobalAveragePool"
            del node.input[1]
            del node.attribute[:]


def keep_dims(model: ModelProto) -> None:
    """Let reductions keep their dimensions, and drop them by an operator of its own, in place.

    OpenVINO 2026.4 takes the rounding behind a mean into its kernel, and where the mean has dropped dimensions the
    integers that come out are wrong.
    """
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        dropped = [attribute for attribute in node.attribute if attribute.name == "keepdims" and not attribute.i]
        if node.op_type.startswith("Reduce") and len(node.input) == 2 and node.input[1] and dropped:
            made, last = node.output[0], model.graph.node[-1]
            last.output[0] = f"{made}_kept"
            next(attribute for attribute in last.attribute if attribute.name == "keepdims").i = 1
            model.graph.node.append(
                helper.make_node("Squeeze", [last.output[0], node.input[1]], [made], f"{made}_squeeze")
            )


def use_transposes(model: ModelProto) -> None:
    """Write matrices that are turned between two reshapes, as the exporter turns attention's keys, as `Transpose`.

    In place. It is the same function with nine operators less for each attention, and one that a runtime can take into
    the product behind it.
    """
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    known = {value.name: value.type.tensor_type.shape for value in (*graph.value_info, *graph.input)}
    constants = {tensor.name: numpy_helper.to_array(tensor).ravel().tolist() for tensor in _whole_numbers(graph)}
    changed = False
    for node in graph.node:
        turned = made.get(node.input[0]) if node.op_type == "Reshape" else None
        flat = made.get(turned.input[0]) if turned is not None and _perm(turned) == [0, 2, 1] else None
        if flat is None or flat.op_type != "Reshape" or flat.input[0] not in known:
            continue
        source, rank = flat.input[0], len(known[flat.input[0]].dim)
        sizes = [(source, dim) for dim in range(rank)]
        flattened, last = (_sizes(each.input[1], rank, made, constants) for each in (flat, node))
        if flattened != [-1, *sizes[-2:]] or last != [*sizes[:-2], *sizes[:-3:-1]]:
            continue
        order = [*range(rank - 2), rank - 1, rank - 2]
        if source in made and (before := _perm(made[source])):
            source, order = made[source].input[0], [before[dim] for dim in order]
        node.op_type, changed = "Transpose", True
        node.input[:] = [source]
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("perm", order))
    if changed:
        _drop_unread(graph)


def _whole_numbers(graph: GraphProto) -> Iterator[TensorProto]:
    return (tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT64)


def _perm(node: NodeProto) -> list[int]:
    """Return the order that a transposition states, or nothing."""
    if node.op_type != "Transpose":
        return []
    return [int(dim) for attribute in node.attribute if attribute.name == "perm" for dim in attribute.ints]


def _sizes(
    name: str, rank: int, made: Mapping[str, NodeProto], constants: Mapping[str, list[int]]
) -> list[int | tuple[str, int]] | None:
    """Return the entries of a shape: numbers, or a tensor of that rank and the dimension whose size it is."""
    if name in constants:
        return list(constants[name])
    node = made.get(name)
    if node is None:
        return None
    if node.op_type == "Concat":
        parts = [_sizes(part, rank, made, constants) for part in node.input]
        return None if None in parts else [entry for part in parts for entry in part or ()]
    if node.op_type == "Shape" and not any(attribute.name == "end" or attribute.i for attribute in node.attribute):
        return [(node.input[0], dim) for dim in range(rank)]
    if node.op_type == "Slice" and len(node.input) <= 4 and all(bound in constants for bound in node.input[1:]):
        start, end, axis = (constants[bound] for bound in (*node.input[1:3], *(node.input[3:] or node.input[1:2])))
        whole = _sizes(node.input[0], rank, made, constants)
        if whole is not None and len(start) == len(end) == 1 and (len(node.input) == 3 or axis == [0]):
            return whole[start[0] : end[0]]
    return None


def _drop_unread(graph: GraphProto) -> None:
    """Remove nodes, in place, whose outputs nobody reads."""
    while True:
        read = {name for inner in _graphs(graph) for node in inner.node for name in node.input}
        read |= {value.name for inner in _graphs(graph) for value in inner.output}
        kept = [node for node in graph.node if read.intersection(node.output)]
        if len(kept) == len(graph.node):
            return
        del graph.node[:]
        graph.node.extend(kept)


def compact(model: ModelProto, scopes: Mapping[str, str]) -> dict[str, str]:
    """Strip in place, store equal tensors once and shorten every name but those of inputs and outputs.

    A node that has one output takes its name, so that either identifies it.

    Returns:
        The scopes under the new node names.
    """
    strip(model)
    _deduplicate(model.graph)
    names = _short_names(model)
    renamed = {}
    for graph in _graphs(model.graph):
        for node in graph.node:
            old = node.name
            for field in (node.input, node.output):
                field[:] = [names.get(name, name) for name in field]
            node.name = next((name for name in node.output if name), "")
            if old in scopes:
                renamed[node.name] = scopes[old]
        for tensor in (*graph.initializer, *graph.input, *graph.output):
            tensor.name = names.get(tensor.name, tensor.name)
    return renamed


def serialize(model: ModelProto) -> bytes:
    """Return the bytes of a model, equal for equal models."""
    return bytes(model.SerializeToString(deterministic=True))


def parse(data: bytes) -> ModelProto:
    """Return the model of ONNX bytes."""
    return onnx.load_model_from_string(data)


def why_no_integers(node: NodeProto, stored: Mapping[str, TensorProto]) -> str:
    """Return why kernels of integers cannot take over a node's weight, or nothing: they compute from float32 alone.

    Args:
        node: whose constants are looked at.
        stored: name → constant of the graph.
    """
    kinds = {stored[name].data_type for name in node.input if name in stored}
    if TensorProto.DOUBLE not in kinds:
        return ""
    return "its weight is float64, and kernels of integers compute from float32 (`model.float()`)"


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _strip_node(node: NodeProto) -> None:
    if node.domain not in ("", "ai.onnx"):
        return
    defaults = {name: entry.default_value for name, entry in onnx.defs.get_schema(node.op_type).attributes.items()}
    ones = ("strides", "dilations") if "Conv" in node.op_type or "Pool" in node.op_type else ()
    kept = []
    for attribute in node.attribute:
        attribute.doc_string = ""
        default = defaults.get(attribute.name)
        stated = default is not None and default.type == attribute.type
        if stated and onnx.helper.get_attribute_value(default) == onnx.helper.get_attribute_value(attribute):
            continue
        if attribute.name in ones and set(attribute.ints) == {1}:
            continue
        if ones and attribute.name == "pads" and set(attribute.ints) == {0}:
            continue
        kept.append(attribute)
    kept.sort(key=lambda attribute: attribute.name)
    kept = [_copy(attribute) for attribute in kept]
    del node.attribute[:]
    node.attribute.extend(kept)


def _copy(attribute: AttributeProto) -> AttributeProto:
    result = AttributeProto()
    result.CopyFrom(attribute)
    return result


def _deduplicate(graph: GraphProto) -> None:
    """Keep one of equal initializers, in the order of their first use, and drop those without a use."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    replaced: dict[str, str] = {}
    kept: list[TensorProto] = []
    used = [name for inner in _graphs(graph) for node in inner.node for name in node.input]
    for name in dict.fromkeys((*used, *(name for name in tensors if name in outputs))):
        if name not in tensors:
            continue
        tensor = _raw(tensors[name])
        key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest())
        if not tensor.raw_data or first.setdefault(key, name) == name or name in outputs:
            kept.append(tensor)
        else:
            replaced[name] = first[key]
    for inner in _graphs(graph):
        for node in inner.node:
            node.input[:] = [replaced.get(name, name) for name in node.input]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _raw(tensor: TensorProto) -> TensorProto:
    """Return a tensor with its values as raw bytes, the shortest form."""
    if tensor.raw_data or tensor.data_type == TensorProto.STRING or tensor.HasField("segment"):
        result = TensorProto()
        result.CopyFrom(tensor)
        return result
    return numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)


def _short_names(model: ModelProto) -> dict[str, str]:
    graph = model.graph
    reserved = {value.name for value in (*graph.input, *graph.output)} | {""}
    fresh = (name for name in _counting() if name not in reserved)
    names: dict[str, str] = {}
    for inner in _graphs(graph):
        for node in inner.node:
            for name in (*node.input, *node.output):
                if name not in reserved and name not in names:
                    names[name] = next(fresh)
        for value in (*inner.input, *inner.output, *inner.initializer):
            if value.name not in reserved and value.name not in names:
                names[value.name] = next(fresh)
    return names


def _counting() -> Iterator[str]:
    for number in count():
        name, rest = _DIGITS[number % len(_DIGITS)], number // len(_DIGITS)
        while rest:
            rest -= 1
            name, rest = _DIGITS[rest % len(_DIGITS)] + name, rest // len(_DIGITS)
        yield name
