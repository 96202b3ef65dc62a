"""ONNX Runtime on the CPU: the reference runtime."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from trimpoint.errors import ArtifactError, LoweringError, MissingDependencyError
from trimpoint.runtimes.base import (
    Exported,
    Formats,
    Lowered,
    OperatorTime,
    Runtime,
    Session,
    calibration_feeds,
    is_dynamic,
)
from trimpoint.signature import Signature

FILE = "model.onnx"
_WARM_UP = 3
_NO_BFLOAT16 = "is computed in float32: in ONNX Runtime 16 bits are for storage"
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""How the names of kernels end that may do what follows them as well."""


class OnnxSession(Session):
    """A model opened in ONNX Runtime."""

    def __init__(self, signature: Signature, session: Any) -> None:
        super().__init__("onnxruntime", signature)
        self.session = session
        self.output_names = [spec.name for spec in signature.outputs]
        # The optimiser may drop an input that nothing reads.
        taken = {entry.name for entry in session.get_inputs()}
        self.taken = [(index, spec.name) for index, spec in enumerate(signature.inputs) if spec.name in taken]

    def run_flat(self, arrays: Sequence[Any]) -> list[Any]:
        """Run arrays in the order of the signature's inputs; return those of its outputs."""
        feeds = {name: arrays[index] for index, name in self.taken}
        return list(self.session.run(self.output_names, feeds))


class OnnxRuntime(Runtime):
    """ONNX Runtime with its CPU execution provider.

    Float32 ships the exported graph as it is, with short names and equal tensors stored once; graph optimisation is
    left to the moment of opening, since doing the basic level beforehand changed neither size nor latency. Int8 is
    ONNX Runtime's own static quantiser (quantise/dequantise form) on the nodes of the modules that have formats and
    on what lies between them; the quantised operators are then fused, as on opening, where that gives bitwise equal
    answers in a smaller file. Dynamic int8 is written as the operators that those of `quantize_dynamic` are fused into,
    and needs no data. Activations of static int8 are stored as uint8 whatever their format's type, since on x86-64 only
    uint8 activations have fused kernels; int8 around zero is uint8 around 128. Matrices on grids in groups
    become `MatMulNBits`.

    References:
        https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """

    name: ClassVar[str] = "onnxruntime"
    install: ClassVar[str] = "pip install onnxruntime"

    def version(self) -> str:
        """Return the installed version."""
        _import()
        return metadata.version("onnxruntime")

    def lower(
        self,
        exported: Exported,
        directory: Path,
        *,
        formats: Formats | None = None,
        calibration: Sequence[Any] = (),
    ) -> Lowered:
        """Write `model.onnx`, float32 or with the formats realised in int8 (see `Runtime.lower`)."""
        from trimpoint.runtimes import onnx_graph, onnx_halves

        model = onnx_graph.parse(exported.onnx)
        unmapped: tuple[str, ...] = ()
        notes: tuple[str, ...] = ()
        if formats:
            halves, others = onnx_halves.split(formats)
            model, unmapped, notes = _quantized(model, exported, others, calibration)
            unmapped += onnx_halves.store(
                model, halves, lambda node: module_of(node.name, exported.scopes), _NO_BFLOAT16
            )
        scopes = onnx_graph.compact(model, _scopes_of(model, exported.scopes))
        _write(directory / FILE, onnx_graph.serialize(model))
        return Lowered(
            runtime=self.name,
            files={"main": (FILE,)},
            signature=exported.signature,
            unmapped=unmapped,
            notes=notes,
            scopes=scopes,
        )

    def lower_one_line_int8(self, exported: Exported, directory: Path, calibration: Sequence[Any]) -> Lowered:
        """Quantise with `quantize_static` and its defaults, as its documentation recommends them for x86-64.

        That is: uint8 activations, int8 weights, one scale per tensor, every operator that it supports. (With int8
        activations, the default of the signature, most convolutions stay in float32 on x86-64.)
        """
        from trimpoint.runtimes import onnx_graph, onnx_quantize

        model = onnx_quantize.preprocess(onnx_graph.parse(exported.onnx))
        model = onnx_quantize.quantize_default(model, calibration_feeds(exported.signature, calibration))
        onnx_graph.strip(model)
        _write(directory / FILE, onnx_graph.serialize(model))
        return Lowered(
            runtime=self.name,
            files={"main": (FILE,)},
            signature=exported.signature,
            scopes=_scopes_of(model, exported.scopes),
        )

    def open(self, directory: Path, lowered: Lowered, *, threads: int = 1, profile: bool = False) -> OnnxSession:
        """Open `model.onnx` with a fixed number of threads that do not spin between calls.

        Raises:
            ArtifactError: if ONNX Runtime cannot read the file.
        """
        ort = _import()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Without this, two sessions in one process spin against each other.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
        path = directory / lowered.files["main"][0]
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            hint = "it has few kernels for float64: give `model.float()` and float32 data"
            raise ArtifactError(
                f"ONNX Runtime cannot open {path.name!r}: {error}", hint if "NOT_IMPLEMENTED" in str(error) else None
            ) from error
        return OnnxSession(lowered.signature, session)

    def operators(
        self, directory: Path, lowered: Lowered, inputs: Any, *, threads: int = 1, repeats: int = 50
    ) -> list[OperatorTime]:
        """Return the time of each operator for these inputs, slowest first, from ONNX Runtime's profiler.

        A kernel that does what follows a product as well goes by the module of the product.
        """
        session = self.open(directory, lowered, threads=threads, profile=True)
        arrays = session.flat_inputs(inputs)
        for _ in range(_WARM_UP + repeats):
            session.run_flat(arrays)
        report = Path(session.session.end_profiling())
        events = json.loads(report.read_text())
        report.unlink()
        report.parent.rmdir()
        times: dict[str, list[float]] = defaultdict(list)
        kinds: dict[str, str] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time")
                times[name].append(event["dur"] / 1e3)
                kinds[name] = event["args"]["op_name"]
        fused = {**lowered.scopes, **_scopes_of_products(directory / FILE, lowered.scopes)}
        return sorted(
            (
                OperatorTime(
                    name=name,
                    kind=kinds[name],
                    module=module_of(name, fused if kinds[name].endswith(_PRODUCTS) else lowered.scopes),
                    ms=_typical(values, _WARM_UP + repeats),
                )
                for name, values in times.items()
            ),
            key=lambda operator: -operator.ms,
        )


def _typical(values: Sequence[float], calls: int) -> float:
    """Return the median over calls of what an operator takes in one; the mean where it runs unequally often."""
    per_call = len(values) // calls
    if per_call * calls != len(values):
        return sum(values) / calls
    return median(sum(values[i : i + per_call]) for i in range(_WARM_UP * per_call, len(values), per_call))


def _scopes_of_products(path: Path, scopes: Mapping[str, str]) -> dict[str, str]:
    """Return node → module of the product in whose kernel it may be computed."""
    import onnx

    from trimpoint.runtimes.onnx_neighbours import product_behind

    model = onnx.load(path, load_external_data=False)
    return {name: scopes[product] for name, product in product_behind(model).items() if product in scopes}


def module_of(name: str, scopes: Mapping[str, str]) -> str:
    """Return the module of a node, also where the runtime has put words around the node's name."""
    if name in scopes:
        return scopes[name]
    known = [key for key in scopes if key and key in _words(name)]
    return scopes[max(known, key=len)] if known else ""


def _words(name: str) -> list[str]:
    words = [""]
    for letter in name:
        if letter.isalnum():
            words[-1] += letter
        else:
            words.append("")
    return words


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("ONNX Runtime is not installed.", f"`{OnnxRuntime.install}`") from error
    return onnxruntime


def _quantized(
    model: Any, exported: Exported, formats: Formats, calibration: Sequence[Any]
) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """Return the model with its formats realised, what could not be, and what to beware of elsewhere.

    Static formats come first, then dynamic ones.
    """
    from trimpoint.runtimes import (
        onnx_channels,
        onnx_dynamic,
        onnx_graph,
        onnx_neighbours,
        onnx_quantize,
        onnx_weights,
    )

    grouped, formats = onnx_weights.split(exported, formats)
    missing = onnx_weights.compress(model, exported, grouped)
    if not formats:
        return model, missing, ()
    prepared = onnx_quantize.preprocess(model)
    each_call = {path: tensors for path, tensors in formats.items() if is_dynamic(tensors)}
    before = {path: tensors for path, tensors in formats.items() if path not in each_call}
    dynamic = onnx_dynamic.select(prepared, exported, each_call)
    static = onnx_quantize.select(prepared, exported, before)
    unmapped = (*missing, *static.unmapped, *dynamic.unmapped)
    if not static.nodes:
        if not dynamic.weights:
            return model, unmapped, ()
        each = onnx_dynamic.quantize(prepared, dynamic)
        return each, unmapped, _overflows(each, exported, calibration)
    separate = onnx_quantize.quantize(prepared, static, calibration_feeds(exported.signature, calibration))
    separate = onnx_dynamic.quantize(separate, dynamic)
    onnx_channels.complete(separate)
    notes = _overflows(separate, exported, calibration)
    onnx_neighbours.keep_float(separate)
    onnx_graph.strip(separate)
    fused = onnx_quantize.fuse(separate)
    onnx_graph.strip(fused)
    one, other = onnx_graph.serialize(separate), onnx_graph.serialize(fused)
    feeds = next(calibration_feeds(exported.signature, calibration))
    smaller = len(other) < len(one) and onnx_quantize.same_answers(one, other, feeds)
    return (fused if smaller else separate), unmapped, notes


def _overflows(model: Any, exported: Exported, calibration: Sequence[Any]) -> tuple[str, ...]:
    """Return a note on each layer that can overflow on CPUs without VNNI; dynamic int8 needs no calibration data."""
    from trimpoint.runtimes import saturation

    feeds = calibration_feeds(exported.signature, calibration) if len(calibration) else ()
    found = saturation.saturations(model, feeds, transposed=False)
    return tuple(saturation.note(each, module_of(each.node, exported.scopes)) for each in found)


def _scopes_of(model: Any, scopes: Mapping[str, str]) -> dict[str, str]:
    """Return the scopes of nodes whose names, or the names of whose outputs, the quantiser has extended."""
    result = {}
    for node in model.graph.node:
        path = module_of(node.name, scopes) or next((p for o in node.output if (p := module_of(o, scopes))), "")
        if path:
            result[node.name] = path
    return result


def _write(path: Path, data: bytes) -> None:
    if len(data) >= 2**31:
        raise LoweringError("The model must be below 2 GiB, the limit of an ONNX file.")
    path.write_bytes(data)
