"""What the kernels of each runtime make of number formats: which they compute fast, and which they only store.

What stands here was measured, on the processors that are named; of others nothing is said. It serves to warn before
work begins: what a model really gains shows only in the artifact that is timed.

Measured with ONNX Runtime 1.31 on one thread, four linear layers of 1536 × 1536, speed over float32 (AVX2 without
VNNI, batch 1 / batch 32): static int8 3.3 / 2.4, dynamic int8 3.3 / 2.4; weights of 4 bits in groups of 32 with int8
activations 3.5 / 1.1, of 3 bits 2.5, of 2 bits 3.6, of 8 bits 2.0 / 0.8; with float32 activations 4 bits 0.4 / 0.75,
8 bits 0.03 / 0.16; nine of ten weights zero, or 16 values in all, 0.9. With AVX-512 4 bits and float32 activations were
seen to reach 1.9. With OpenVINO 2026.4, one layer of 4096 × 4096, batch 1: weights of 8, 4 and 2 bits 1.6, 2.2, 2.1.
Computing in bfloat16 with OpenVINO (AVX512-BF16): linear layers 1.7 to 1.8, a six-layer transformer 1.7 to 1.8, an LSTM
1.7, convolutions of 64 to 256 channels 1.9, a ResNet-20 1.6.
"""

from collections.abc import Callable, Mapping

from trimpoint.values import Format

RECURRENT = ("LSTM", "GRU", "RNN")
MANY = 8
"""Samples in a call from which weights are read seldom enough for their size not to count."""
ONLY_CODED = (
    "makes nothing faster, and no file that a runtime loads smaller: there are no kernels for zeros or shared values; "
    "only a coded file gets smaller (`trimpoint pack`)"
)


def drawback(runtime: str, formats: Mapping[str, Format], *, instructions: str, batch: int = 1, layer: str = "") -> str:
    """Return why formats will make a layer no faster in a runtime; nothing where they do, or where nothing is known.

    Args:
        runtime: its name.
        formats: tensor → number format, of one layer.
        instructions: vector extensions of the processor, as `instruction_set` gives them.
        batch: samples in one call.
        layer: class of the module, such as `"GRU"`; empty where it is not known.

    Returns:
        The rest of a sentence that begins with what chose the formats.

    Example:
        >>> formats = {"weight": Format(dtype="int4"), "input": Format(dtype="uint8")}
        >>> drawback("onnxruntime", formats, instructions="avx2").split(":")[0]
        'is no faster than with 8 bits, and its file no smaller'
        >>> drawback("onnxruntime", {**formats, "weight": Format(dtype="int8")}, instructions="avx2")
        ''
    """
    if "weight" in formats and formats["weight"].dtype in ("float16", "bfloat16"):
        return _halves(runtime, formats, instructions)
    rule = _RULES.get(runtime)
    return rule(formats, instructions, batch, layer) if rule is not None and "weight" in formats else ""


def _halves(runtime: str, formats: Mapping[str, Format], instructions: str) -> str:
    smaller = "makes the file smaller, not the model faster"
    if "input" not in formats:
        return f"{smaller}: the numbers are cast to float32 and computed with there"
    if runtime != "openvino":
        return f"{smaller}: of these runtimes only OpenVINO computes in bfloat16"
    known = instructions.split()
    if "avx2" in known and not {"avx512_bf16", "amx_bf16"} & set(known):
        return f"{smaller}: this CPU has no products of bfloat16, and computes in float32"
    return ""


def _onnxruntime(formats: Mapping[str, Format], instructions: str, batch: int, layer: str) -> str:
    weight, read = formats["weight"], formats.get("input")
    if read is not None and read.dynamic:
        return _stays_float(layer) if layer == "GRU" else ""
    if read is not None and read.granularity == "tensor":
        return _as_eight(weight.bits)
    held = 8 if weight.bits > 4 else 2 if weight.bits == 2 else 4
    if read is None:
        if held == 8:
            return "makes it slower: kernels of 8 bits want int8 activations, without which they took ten times as long"
        if "avx2" in instructions.split() and "avx512f" not in instructions.split():
            return "makes it slower on this CPU: with float32 activations its kernels took about twice as long"
        return ""
    if batch >= MANY:
        return (
            f"makes the file smaller, not the model faster, at a batch of {batch}: with many samples the time goes "
            "into sums, not into reading weights"
        )
    return "" if weight.bits == held else _no_better_than(held, f"kernels hold them in {held}")


def _openvino(formats: Mapping[str, Format], instructions: str, batch: int, layer: str) -> str:  # noqa: ARG001
    weight, read = formats["weight"], formats.get("input")
    if read is not None and read.dynamic:
        return _stays_float(layer) if layer in RECURRENT else ""
    if read is not None and read.granularity == "tensor":
        return _as_eight(weight.bits)
    held = 8 if weight.bits > 4 else 2 if weight.bits == 2 else 4
    return "" if weight.bits == held else _no_better_than(held, f"kernels hold them in {held}")


def _executorch(formats: Mapping[str, Format], instructions: str, batch: int, layer: str) -> str:  # noqa: ARG001
    weight, read = formats["weight"], formats.get("input")
    if "group" in (weight.granularity, read.granularity if read is not None else ""):
        return "makes it neither faster nor smaller: the lowering to executorch leaves weights in groups in float32"
    if layer in RECURRENT:
        return _stays_float(layer)
    return _as_eight(weight.bits) if read is not None and not read.dynamic else ""


def _as_eight(bits: int) -> str:
    return _no_better_than(8, "kernels compute and store 8") if bits < 8 else ""


def _no_better_than(bits: int, why: str) -> str:
    return (
        f"is no faster than with {bits} bits, and its file no smaller: {why}; only a coded file gets smaller "
        "(`trimpoint pack`)"
    )


def _stays_float(layer: str) -> str:
    return f"makes it neither faster nor smaller: there is no int8 kernel for {layer}, which stays in float32"


_RULES: Mapping[str, Callable[[Mapping[str, Format], str, int, str], str]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "executorch": _executorch,
}
