"""Which operators of an ONNX graph go with their neighbours: into int8, into one kernel, or by sharing their numbers.

This module needs `onnx` (the full installation); what opens an artifact does not import it.
"""

from collections.abc import Iterable, Iterator, Mapping

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

GLUE = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Flatten",
    "GlobalAveragePool",
    "LeakyRelu",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that follow their neighbours into int8, so that no conversion stands between two int8 kernels."""
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that take most of the time; kernels do what follows them on the way."""
_HANDED_ON = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Those that give out some of the numbers that they take in."""


def glue(model: ModelProto, chosen: set[str], weights: set[str], symmetric: Iterable[str] = ()) -> list[str]:
    """Return the nodes that follow quantised nodes into int8: all data that they read comes from int8 operators.

    The outputs of the model are left in float32, so that they are not rounded once more. So are the bounds of values
    for which the quantiser would take rounding that does not keep them.

    Args:
        model: preprocessed.
        chosen: names of the quantised nodes.
        weights: names of constants.
        symmetric: activations whose zero point is in the middle, where that is not so for all.
    """
    nodes = list(model.graph.node)
    made_by = {name: node for node in nodes for name in node.output}
    middle = {other for name in symmetric for other in same_numbers(model, name)}
    bounds = {node.name for node in nodes if node.op_type in ("Relu", "Clip") and node.output[0] in middle}
    bounds |= {node.name for node in nodes if node.op_type == "Clip" and not _holds_zero(model, node)}
    candidates = {node.name for node in nodes if node.op_type in GLUE} - bounds
    outputs = {value.name for value in model.graph.output}
    while True:
        inside = chosen | candidates
        kept = {
            node.name
            for node in nodes
            if node.name in candidates
            and _fed(node, made_by, inside, weights)
            and not any(name in outputs for name in node.output)
        }
        if kept == candidates:
            return [node.name for node in nodes if node.name in kept]
        candidates = kept


def _holds_zero(model: ModelProto, node: NodeProto) -> bool:
    """Return whether the bounds of a `Clip` are known, and zero lies between them, as in every range of integers."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in node.input[1:]}
    if any(name and name not in stored for name in node.input[1:]):
        return False
    low, high = [numpy_helper.to_array(stored[name]) if name else 0 for name in (*node.input[1:], "", "")][:2]
    return bool(low <= 0 <= high)


def _fed(node: NodeProto, made_by: Mapping[str, NodeProto], inside: set[str], weights: set[str]) -> bool:
    """Return whether the data inputs of a node come from inside; shapes and other constants do not count."""
    data = [name for name in node.input[: 1 if node.op_type not in ("Add", "Mul", "Concat") else None] if name]
    if not data or any(name in weights for name in data):
        return False
    return all(name in made_by and made_by[name].name in inside for name in data)


def same_numbers(model: ModelProto, name: str) -> Iterator[str]:
    """Yield a tensor and those that hand their numbers on to it, whose scale it has."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    yield name
    while name in made_by and made_by[name].op_type in _HANDED_ON:
        name = made_by[name].input[0]
        yield name


def keep_float(model: ModelProto) -> None:
    """Keep products with float32 weights as they are, in place, between neighbours that are quantised.

    Where a convolution or Gemm reads what was dequantised, and its result is quantised after nothing but bounds, ONNX
    Runtime rounds its weight, with one scale and 8 bits, whenever the file is opened (`WeightBiasQuantization`, which
    also looks through operators that hand numbers on). A sum of one term in between keeps it from that.

    Args:
        model: in quantise/dequantise form.
    """
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    made_by = {name: node for node in model.graph.node for name in node.output}
    read_by: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(node)

    def is_rounded(name: str) -> bool:
        followers = read_by.get(name, [])
        passed = [node.output[0] for node in followers if node.op_type in _HANDED_ON]
        return any(node.op_type == "QuantizeLinear" for node in followers) or any(map(is_rounded, passed))

    nodes = list(model.graph.node)
    for product in [node for node in nodes if node.op_type in PRODUCTS and node.input[1] in floats]:
        first = list(same_numbers(model, product.input[0]))[-1]
        if first not in made_by or made_by[first].op_type != "DequantizeLinear":
            continue
        last = product
        while len(after := read_by.get(last.output[0], [])) == 1 and after[0].op_type in ("Relu", "Clip"):
            last = after[0]
        if not is_rounded(last.output[0]):
            continue
        kept = f"{last.output[0]}_float32"
        for node in read_by[last.output[0]]:
            for place, name in enumerate(node.input):
                if name == last.output[0]:
                    node.input[place] = kept
        term = helper.make_node("Sum", [last.output[0]], [kept], name=f"{product.name}_float32")
        nodes.insert(nodes.index(last) + 1, term)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def product_behind(model: ModelProto) -> dict[str, str]:
    """Return node → product, for nodes that a runtime may compute in the kernel of a product that only they read.

    Where several products feed a node, the last of them: a kernel adds what is there already.
    """
    nodes = list(model.graph.node)
    place = {output: position for position, node in enumerate(nodes) for output in node.output}
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    found: dict[str, str] = {}
    for node in nodes:
        if node.op_type in PRODUCTS:
            found[node.name] = node.name
            continue
        behind = [nodes[place[name]].name for name in node.input if name in place and readers[name] == 1]
        products = [found[name] for name in behind if name in found]
        if products:
            found[node.name] = products[-1]
    return found
