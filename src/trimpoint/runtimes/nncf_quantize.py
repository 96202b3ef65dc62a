"""What NNCF makes of an OpenVINO model: 8-bit weights alone, and its one-line int8.

This module needs `nncf`; what opens an artifact does not import it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimpoint.errors import LoweringError
from trimpoint.quiet import quiet
from trimpoint.runtimes.base import Exported, Formats, calibration_feeds
from trimpoint.signature import Signature
from trimpoint.values import Format

_WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")


def compress_weights(model: Any, exported: Exported, formats: Formats) -> tuple[Any, tuple[str, ...]]:
    """Return the model with 8-bit weights where there are formats, and `path: reason` for what is not as they ask.

    Whether activations are rounded is up to OpenVINO's plug-in: on processors with 8-bit dot products it rounds those
    of linear layers in each call, in groups of 32; on others the weights are brought back to float32.

    Raises:
        LoweringError: if NNCF fails.

    References:
        https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-optimum-intel.html, dynamic
        quantization; https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/weight-compression.html
    """
    scopes = exported.scopes
    kinds = {
        op.get_friendly_name(): (scopes.get(op.get_friendly_name().partition("/")[0], ""), op.get_type_name())
        for op in model.get_ordered_ops()
        if op.get_type_name() in (*_WEIGHTED, "Gather")
    }
    present = {path for path, _ in kinds.values()}
    unmapped, chosen = [], []
    for path, tensors in formats.items():
        if path not in present:
            unmapped.append(f"{path}: NNCF compresses the weights of products and embeddings, and finds none of it")
        elif tensors["weight"].dtype != "int8":
            unmapped.append(f"{path}: NNCF's weights of 8 bits are no {tensors['weight'].dtype}")
        else:
            chosen.append(path)
            unmapped += [f"{path}: {words}" for words in _other(tensors, path in exported.grids)]
    if not chosen:
        return model, tuple(unmapped)
    if any("input" in formats[path] for path in chosen):
        unmapped.append("activations: OpenVINO rounds them on CPUs with VNNI only, and in groups of 32")
    nncf = _import()
    ignored = sorted(name for name, (path, _) in kinds.items() if path not in chosen)
    scope = nncf.IgnoredScope(names=ignored, validate=False)
    try:
        with quiet():
            mode = nncf.CompressWeightsMode.INT8_SYM
            return nncf.compress_weights(model, mode=mode, ignored_scope=scope), tuple(unmapped)
    except Exception as error:
        raise LoweringError(f"NNCF cannot compress the weights: {type(error).__name__}: {error}") from error


def _other(tensors: Mapping[str, Format], on_grid: bool) -> Iterator[str]:
    """Yield in what compressed weights differ from what is asked for."""
    if tensors["weight"].granularity != "channel":
        yield "NNCF has one scale per channel for its weight"
    if on_grid:
        yield "NNCF takes no integers, it rounds anew"


def quantize_default(model: Any, signature: Signature, calibration: Sequence[Any]) -> Any:
    """Return the model as `nncf.quantize(model, dataset)` makes it."""
    nncf = _import()
    batches = list(calibration_feeds(signature, calibration))
    try:
        with quiet():
            return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    except Exception as error:
        raise LoweringError(f"NNCF cannot quantise the model: {type(error).__name__}: {error}") from error


def _import() -> Any:
    # NNCF reports its use to its vendor unless this is set while it is imported.
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    try:
        with quiet():
            import nncf
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
    return nncf
