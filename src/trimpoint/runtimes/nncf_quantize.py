"""Realise int8 formats on an OpenVINO model with NNCF: post-training quantisation, and 8-bit weights alone.

This module needs `nncf`; what opens an artifact does not import it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimpoint.errors import DataError, LoweringError
from trimpoint.quiet import quiet
from trimpoint.runtimes.base import Exported, Formats, calibration_feeds
from trimpoint.signature import Signature
from trimpoint.values import Format

_WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
_HOPS = 4
_RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell")


def quantize(
    model: Any, exported: Exported, formats: Formats, calibration: Sequence[Any]
) -> tuple[Any, tuple[str, ...]]:
    """Return the model quantised where there are formats, and `path: reason` for those that cannot be realised.

    NNCF places the quantisers; every weighted operator of a module without a format is excluded.

    Raises:
        DataError: if there is no calibration data.
        LoweringError: if NNCF fails.
    """
    scopes = exported.scopes
    weighted = {
        op.get_friendly_name(): scopes.get(op.get_friendly_name().partition("/")[0], "")
        for op in model.get_ordered_ops()
        if op.get_type_name() in (*_WEIGHTED, *_RECURRENT)
    }
    present = {
        weighted[op.get_friendly_name()]
        for op in model.get_ordered_ops()
        if op.get_type_name() in _WEIGHTED and op.get_friendly_name() in weighted
    }
    unmapped, chosen = [], {}
    for path, tensors in formats.items():
        reason = _refusal(tensors) or ("" if path in present else "NNCF finds no convolution or product of it")
        if reason:
            unmapped.append(f"{path}: {reason}")
        else:
            chosen[path] = tensors
    if not chosen:
        return model, tuple(unmapped)
    unmapped += [f"{path}: NNCF takes no integers, it rounds anew" for path in chosen if path in exported.grids]
    unmapped += [f"{path}: NNCF takes no ranges, it calibrates anew" for path in chosen if path in exported.ranges]
    unmapped += [
        f"{path}: NNCF has no range by {tensors['input'].observer}, it takes its own"
        for path, tensors in chosen.items()
        if tensors["input"].observer != "minmax"
    ]
    nncf = _import()
    first = next(iter(chosen.values()))
    if any(dict(tensors) != dict(first) for tensors in chosen.values()):
        unmapped.append(f"{next(iter(chosen))}: NNCF has one setting for all modules, that of this one is used")
    quantization = nncf.quantization.advanced_parameters
    mode = {True: nncf.quantization.QuantizationPreset.PERFORMANCE, False: nncf.quantization.QuantizationPreset.MIXED}
    fix = quantization.OverflowFix.ENABLE if first["weight"].reduce_range else quantization.OverflowFix.DISABLE
    ignored = sorted(name for name, path in weighted.items() if path not in chosen)
    settings: dict[str, Any] = {
        "preset": mode[first["input"].symmetric],
        "ignored_scope": nncf.IgnoredScope(names=ignored, validate=False),
        "advanced_parameters": nncf.AdvancedQuantizationParameters(
            overflow_fix=fix,
            weights_quantization_params=quantization.QuantizationParameters(
                per_channel=first["weight"].granularity == "channel"
            ),
        ),
    }
    if _attends(model):
        settings["model_type"] = nncf.ModelType.TRANSFORMER
    return _run(nncf, model, exported.signature, calibration, settings), tuple(unmapped)


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
    return _run(_import(), model, signature, calibration, {})


def _attends(model: Any) -> bool:
    """Return whether a model has attention: a softmax that a matrix product reads, at most a few operators later.

    NNCF then smooths outliers between channels and keeps what it knows to be sensitive in float32; without that, int8
    transformers can lose their answers altogether.

    References:
        https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html;
        Xiao et al., "SmoothQuant" (2023).
    """
    reached = [op for op in model.get_ordered_ops() if op.get_type_name() in ("Softmax", "ScaledDotProductAttention")]
    if any(op.get_type_name() == "ScaledDotProductAttention" for op in reached):
        return True
    for _ in range(_HOPS):
        reached = [reader.get_node() for op in reached for out in op.outputs() for reader in out.get_target_inputs()]
        if any(op.get_type_name() == "MatMul" for op in reached):
            return True
    return False


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


def _run(nncf: Any, model: Any, signature: Signature, calibration: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    batches = list(calibration_feeds(signature, calibration))
    try:
        with quiet():
            return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), **settings)
    except DataError:
        raise
    except Exception as error:
        raise LoweringError(f"NNCF cannot quantise the model: {type(error).__name__}: {error}") from error


def _refusal(tensors: Mapping[str, Format]) -> str:
    """Return why NNCF cannot realise these formats, or nothing."""
    for tensor, wanted in tensors.items():
        if wanted.dtype not in ("int8", "uint8"):
            return f"NNCF's static quantisation has no {wanted.dtype} for its {tensor}"
        if wanted.granularity == "group" or (tensor != "weight" and wanted.granularity != "tensor"):
            return f"NNCF's static quantisation has no scale per {wanted.granularity} for its {tensor}"
    missing = [tensor for tensor in ("weight", "input") if tensor not in tensors]
    return f"static quantisation needs a format for its {missing[0]} too" if missing else ""
