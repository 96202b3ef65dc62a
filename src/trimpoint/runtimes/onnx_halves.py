"""Weights of 16 bits on an ONNX graph: stored as float16 or bfloat16, cast to float32 when the file is opened.

This module needs `onnx` (the full installation); what opens an artifact does not import it.
"""

from collections.abc import Callable

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trimpoint.quantization.halves import as_bits, why_not
from trimpoint.runtimes.base import Formats

_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def split(formats: Formats) -> tuple[Formats, Formats]:
    """Return the formats of weights of 16-bit floats, and the others."""
    halves = {path for path, tensors in formats.items() if "weight" in tensors and tensors["weight"].dtype in _TYPES}
    return (
        {path: tensors for path, tensors in formats.items() if path in halves},
        {path: tensors for path, tensors in formats.items() if path not in halves},
    )


def store(
    model: ModelProto, formats: Formats, module_of: Callable[[NodeProto], str], not_computed: str = ""
) -> tuple[str, ...]:
    """Store weights in 16 bits, in place, and return `path: reason` for those that cannot be.

    Weights are tensors of at least two dimensions. Runtimes cast them once, as the file is opened, and compute in
    float32: the file gets smaller and nothing faster.

    Args:
        model: with nothing to be folded any more, which would bring the weights back to float32.
        formats: of such weights.
        module_of: returns the module that a node came from.
        not_computed: why a runtime does not compute in 16 bits, where formats ask for that too.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    nodes: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        nodes.setdefault(module_of(node), []).append(node)
    casts: dict[str, NodeProto] = {}
    unmapped = []
    for path, tensors in formats.items():
        kind = tensors["weight"].dtype
        names = [n for node in nodes.get(path, ()) for n in node.input if n in stored and len(stored[n].dims) > 1]
        reason = "" if names else "no operator in the exported graph reads a weight of it"
        for name in dict.fromkeys(names):
            if name in casts:
                continue
            values = numpy_helper.to_array(stored[name])
            if reason := why_not(values, kind):
                break
            short = f"{name}.half"
            raw = as_bits(values, kind).astype("<u2").tobytes()
            stored[name].CopyFrom(helper.make_tensor(short, _TYPES[kind], values.shape, raw, raw=True))
            casts[name] = helper.make_node("Cast", [short], [name], name=f"{name}.cast", to=TensorProto.FLOAT)
        if reason:
            unmapped.append(f"{path}: {reason}")
        elif "input" in tensors and not_computed:
            unmapped.append(f"{path}: {not_computed}")
    for cast in reversed(casts.values()):
        model.graph.node.insert(0, cast)
    return tuple(unmapped)
