"""Realise int8 formats on an OpenVINO model with NNCF's post-training quantisation.

This module needs `nncf`; what opens an artifact does not import it.
"""

import os
from collections.abc import Mapping, Sequence
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
