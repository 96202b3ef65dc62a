"""Matrices in groups of few bits on an ONNX graph: ONNX Runtime's `MatMulNBits`, holding the integers of the grids.

This module needs `onnx` (the full installation); what opens an artifact does not import it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trimpoint.quantization.grid import GroupGrid
from trimpoint.runtimes import onnx_graph
from trimpoint.runtimes.base import Exported, Formats
from trimpoint.values import Format

_DOMAIN = "com.microsoft"
_BLOCKS = (256, 128, 64, 32, 16)
_EXACT = 1e-5
"""Share of the largest weight by which a weight may lie beside its grid, by rounding in float32."""
_INT8 = 4
"""The accuracy level at which kernels may round activations to int8, block by block."""


def split(exported: Exported, formats: Formats) -> tuple[Formats, Formats]:
    """Return the formats of weights that are in groups, and the others."""
    grouped = {path for path, grid in exported.grids.items() if isinstance(grid, GroupGrid)}
    return (
        {path: tensors for path, tensors in formats.items() if path in grouped},
        {path: tensors for path, tensors in formats.items() if path not in grouped},
    )


def compress(model: ModelProto, exported: Exported, formats: Formats, *, plain: bool = False) -> tuple[str, ...]:
    """Put the integers of grids in place of float matrices, in place; return `path: reason` for what cannot be.

    A factor of the inputs goes into the layer normalisation in front where no one else reads that, or becomes a
    multiplication.

    Args:
        model: as exported.
        exported: with the grids.
        formats: of modules with such grids.
        plain: for a reader that makes a product with an expression of integers and scales of each node, as OpenVINO
            does: of any number of bits, and inputs are filled up with zeros to whole blocks.

    References:
        https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    unmapped, added = [], False
    for path, tensors in formats.items():
        grid = exported.grids[path]
        nodes = [node for node in model.graph.node if exported.scopes.get(node.name) == path]
        products = [node for node in nodes if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored]
        reason = "" if products else "no product with its weight is in the exported graph"
        for node in products:
            reason = _replace(model, node, grid, tensors, stored, plain) if isinstance(grid, GroupGrid) else ""
            added = added or not reason
        if reason:
            unmapped.append(f"{path}: {reason}")
    if added:
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return tuple(unmapped)


def _replace(
    model: ModelProto,
    node: NodeProto,
    grid: GroupGrid,
    tensors: Mapping[str, Format],
    stored: Mapping[str, TensorProto],
    plain: bool,
) -> str:
    """Turn a node into a product of few bits, in place, or return why not."""
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if settings.pop("transA", 0) or settings.pop("alpha", 1.0) != 1.0 or settings.pop("beta", 1.0) != 1.0:
        return "its product is scaled or transposed in the graph"
    if reason := onnx_graph.why_no_integers(node, stored):
        return reason
    weight = numpy_helper.to_array(stored[node.input[1]])
    weight = weight if settings.get("transB", 0) else weight.T
    outputs, inputs = grid.codes.shape
    if weight.shape != (outputs, inputs):
        return "its weight has another shape in the graph"
    if np.abs(weight - grid.weight()).max(initial=0) > _EXACT * max(np.abs(weight).max(initial=0), 1e-30):
        return "its weight is not on its grid in the graph"
    level = _INT8 if "input" in tensors else 0
    packed = pack(grid, whole=level == 0 and not plain, even=plain)
    name = node.output[0]
    source = node.input[0] if grid.factor is None else _scaled(model, node, grid.factor, stored)
    block, bits = packed["block"], packed["bits"]
    if plain and (missing := packed["codes"].shape[1] * block - inputs):
        source, inputs = _filled_up(model, node, source, missing), inputs + missing
    given = [source]
    for kind in ("codes", "scale", "zero"):
        if kind in packed:
            model.graph.initializer.append(numpy_helper.from_array(packed[kind], f"{name}.{kind}"))
            given.append(f"{name}.{kind}")
    if len(node.input) > 2 and node.input[2]:
        given += [""] * (5 - len(given)) + [node.input[2]]
    node.op_type, node.domain = "MatMulNBits", _DOMAIN
    node.input[:] = given
    del node.attribute[:]
    values = {"K": inputs, "N": outputs, "bits": bits, "block_size": block} | (
        {"accuracy_level": level} if level else {}
    )
    node.attribute.extend(helper.make_attribute(key, value) for key, value in values.items())
    return ""


def pack(grid: GroupGrid, *, whole: bool = False, even: bool = False) -> dict[str, Any]:
    """Return a grid as `MatMulNBits` takes it: `codes` `[outputs, blocks, bytes]`, `scale`, `zero`, `block`, `bits`.

    Blocks are powers of two from 16 to 256 that do not reach over a group: of these the size that takes the least
    room. There is no `zero` where all zero points are the middle.

    Args:
        grid: in groups of a power of two, or with one scale for all inputs.
        whole: use no containers of 2 bits, for which there are no kernels without int8.
        even: as many blocks as zero points fill whole bytes, where there are any.
    """
    outputs, inputs = grid.codes.shape
    bits = 8 if grid.bits > 4 else 2 if grid.bits == 2 and not whole else 4
    fitting = [size for size in _BLOCKS if grid.group >= inputs or grid.group % size == 0]
    middling = bool((grid.zero == 2 ** (grid.bits - 1)).all())
    step = 8 // bits if even and not middling else 1
    counts = {size: -(-inputs // (size * step)) * step for size in fitting}
    block = min(fitting, key=lambda size: counts[size] * (size * bits / 8 + 4 + bits / 8))
    count = counts[block]
    which = np.minimum(np.arange(count) * block // grid.group, grid.scale.shape[1] - 1)
    scale, zero = grid.scale[:, which].astype(np.float32), grid.zero[:, which]
    codes = np.zeros((outputs, count * block), np.uint8)
    codes[:, :inputs] = grid.codes
    middle = 2 ** (bits - 1)
    result: dict[str, Any] = {"block": block, "bits": bits, "scale": np.ascontiguousarray(scale.reshape(-1))}
    if middling:
        codes += np.uint8(middle - 2 ** (grid.bits - 1))
    else:
        result["zero"] = _packed(zero, bits).reshape(-1)
    result["codes"] = _packed(codes, bits).reshape(outputs, count, block * bits // 8)
    return result


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Return rows of small numbers as bytes, the first in the lowest bits."""
    per = 8 // bits
    rows = np.zeros((len(values), -(-values.shape[1] // per) * per), np.uint8)
    rows[:, : values.shape[1]] = values
    parts = [rows[:, place::per] << np.uint8(place * bits) for place in range(per)]
    result: np.ndarray = np.bitwise_or.reduce(parts)
    return result


def _filled_up(model: ModelProto, node: NodeProto, source: str, missing: int) -> str:
    """Return the name of a node's input with zeros behind the last channel."""
    name = f"{node.output[0]}.whole"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, missing], np.int64), f"{name}.pads"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), f"{name}.axes"))
    pad = helper.make_node("Pad", [source, f"{name}.pads", "", f"{name}.axes"], [name], name=name)
    _insert(model, node, pad)
    return name


def _insert(model: ModelProto, node: NodeProto, before: NodeProto) -> None:
    place = next(index for index, other in enumerate(model.graph.node) if other.name == node.name)
    model.graph.node.insert(place, before)


def _scaled(model: ModelProto, node: NodeProto, factor: np.ndarray, stored: Mapping[str, TensorProto]) -> str:
    """Return the name of a node's first input times a factor of each channel."""
    source, name = str(node.input[0]), str(node.output[0])
    factor = factor.astype(np.float32)
    maker = next((other for other in model.graph.node if source in other.output), None)
    readers = [other for other in model.graph.node if source in other.input]
    seen = len(readers) > 1 or any(value.name == source for value in model.graph.output)
    if maker is not None and maker.op_type == "LayerNormalization" and not seen:
        affine = [numpy_helper.to_array(stored[part]) for part in maker.input[1:] if part in stored]
        if len(affine) == len(maker.input) - 1 and all(each.shape == factor.shape for each in affine):
            for place, each in enumerate(affine, 1):
                maker.input[place] = f"{name}.norm{place}"
                model.graph.initializer.append(numpy_helper.from_array(each * factor, maker.input[place]))
            return source
    model.graph.initializer.append(numpy_helper.from_array(factor, f"{name}.factor"))
    scaled = helper.make_node("Mul", [source, f"{name}.factor"], [f"{name}.scaled"], name=f"{name}.scaled")
    _insert(model, node, scaled)
    return f"{name}.scaled"
