"""16-bit floats in an OpenVINO model: stored as such, and computed with where the plug-in is told to.

The plug-in computes a model in bfloat16 as a whole, on processors that have its products. Single convolutions and
recurrent layers can be kept out of that, by an attribute of the file that the plug-in reads; matrix products cannot,
since it drops the attribute as it makes fully connected layers of them. Hence float32 wins: the model is computed in
bfloat16 where no matrix product with weights is meant to be in float32.

References:
    OpenVINO, "Precision control", https://docs.openvino.ai/2026/openvino-workflow/running-inference/
    optimize-inference/precision-control.html
"""

from collections.abc import Callable, Collection
from typing import Any

from trimpoint.runtimes.base import Formats

HINT, OPTIONS = "INFERENCE_PRECISION_HINT", "runtime_options"
"""Where a file says how it is to be compiled; see `openvino.properties`."""
CAPABILITY = "BF16"
NOTE = (
    "what is not int8 is computed in bfloat16 on processors that have its products (AVX512-BF16, AMX), and in float32, "
    "slower and more exactly, on others"
)
_PRODUCTS = ("MatMul",)
_SEPARABLE = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    *("LSTMCell", "LSTMSequence", "GRUCell", "GRUSequence", "RNNCell", "RNNSequence"),
)
_PASSED = ("Convert", "Reshape", "Transpose", "Multiply", "Subtract", "Unsqueeze", "Squeeze", "FakeQuantize")


def store(model: Any, kind: str) -> None:
    """Store in 16 bits, in place, the weights that consist of such numbers: reading has cast them to float32.

    The plug-in does so again when it compiles the model.

    Args:
        model: of OpenVINO.
        kind: `"float16"` or `"bfloat16"`.
    """
    from openvino import Type, opset13

    from trimpoint.quantization.halves import rounded

    types = {"float16": Type.f16, "bfloat16": Type.bf16}
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_element_type() != Type.f32 or len(op.get_output_shape(0)) < 2:
            continue
        if op.data.size > 1 and (rounded(op.data, kind) == op.data).all():
            whole = opset13.convert(opset13.constant(op.data, types[kind]), "f32")
            for reader in op.output(0).get_target_inputs():
                reader.replace_source_output(whole.output(0))


def compute(
    model: Any, halves: Formats, int8: Collection[str], module_of: Callable[[str], str]
) -> tuple[frozenset[str], tuple[str, ...], tuple[str, ...]]:
    """Have a model computed in bfloat16, in place, where formats ask for it and none forbids it.

    Args:
        model: of OpenVINO.
        halves: formats of modules with weights of 16 bits; those with a format for the input ask for it.
        int8: modules whose products are computed in int8.
        module_of: returns the module that an operator came from, by its name.

    Returns:
        Names of operators that must stay in float32; `path: reason` where nothing is computed as asked for; notes.
    """
    asked = {path for path, tensors in halves.items() if "input" in tensors}
    if not asked:
        return frozenset(), (), ()
    exact, barred = [], set()
    for op in model.get_ordered_ops():
        kind, path = op.get_type_name(), module_of(op.get_friendly_name())
        if path in asked or path in int8:
            continue
        if kind in _SEPARABLE:
            exact.append(op.get_friendly_name())
        elif kind in _PRODUCTS and any(_constant(op.input_value(i)) for i in range(op.get_input_size())):
            barred.add(path)
    if barred:
        other = f"as the matrix products of {min(barred) or 'the model itself'} must be, and OpenVINO has one setting"
        return frozenset(), tuple(f"{path}: is computed in float32, {other}" for path in sorted(asked)), ()
    model.set_rt_info("bf16", [OPTIONS, HINT])
    return frozenset(exact), (), (NOTE,)


def precision(core: Any, model: Any) -> str:
    """Return the precision that a model is to be compiled with: `"f32"`, unless its file asks for another that exists.

    Where a processor has no such products the plug-in may imitate them, slower than float32.

    Args:
        core: of OpenVINO.
        model: as it was read.
    """
    path = [OPTIONS, HINT]
    asked = model.has_rt_info(path) and str(model.get_rt_info(path).value) == "bf16"
    return "bf16" if asked and CAPABILITY in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def _constant(output: Any) -> bool:
    """Return whether a value is a weight, whatever is done to it on the way."""
    node = output.get_node()
    while node.get_type_name() in _PASSED:
        node = node.input_value(0).get_node()
    return str(node.get_type_name()) == "Constant"
