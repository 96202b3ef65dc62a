"""OpenVINO on the CPU."""

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from trimpoint.errors import ArtifactError, LoweringError, MissingDependencyError
from trimpoint.quiet import quiet
from trimpoint.runtimes import openvino_halves
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
from trimpoint.runtimes.openvino_halves import OPTIONS
from trimpoint.signature import Signature
from trimpoint.values import Format

GRAPH, WEIGHTS = "model.xml", "model.bin"
_WARM_UP = 3
_REFUSED = re.compile(r"^-- (\w+)-\d+ with a message:\n(.+?)\n\n", re.DOTALL | re.MULTILINE)


class OpenVinoSession(Session):
    """A model compiled by OpenVINO for the CPU."""

    def __init__(self, signature: Signature, compiled: Any) -> None:
        super().__init__("openvino", signature)
        self.request = compiled.create_infer_request()
        known = {name for port in compiled.inputs for name in port.get_names()}
        # An input that nothing reads is not part of the compiled model.
        self.taken = [(index, spec.name) for index, spec in enumerate(signature.inputs) if spec.name in known]
        ports = {name: port for port in compiled.outputs for name in port.get_names()}
        self.ports = [ports[spec.name] for spec in signature.outputs]

    def run_flat(self, arrays: Sequence[Any]) -> list[Any]:
        """Run arrays in the order of the signature's inputs; return copies of its outputs."""
        results = self.request.infer({name: arrays[index] for index, name in self.taken}, share_inputs=True)
        return [results[port] for port in self.ports]


class OpenVino(Runtime):
    """OpenVINO with its CPU plug-in, float32 arithmetic pinned where the model is float32.

    Static int8 is the quantised graph that ONNX Runtime gets too, with biases in float32; the plug-in fuses it. Where
    formats are dynamic, NNCF stores weights in 8 bits, and it is up to the plug-in whether activations are rounded.
    Matrices on grids in groups are stored as their integers, of 2, 4 or 8 bits, scales and zero points, and stay so in
    memory: the plug-in brings them back to float32 as it multiplies. Where processors have 8-bit dot products it also
    rounds the inputs of such a product, in each call and in groups of 32, unless a format asks for float32 inputs.

    References:
        OpenVINO, "Low precision transformations", for the form of quantised graphs that the plug-in takes;
        https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/weight-compression.html
    """

    name: ClassVar[str] = "openvino"
    install: ClassVar[str] = 'pip install "trimpoint[openvino]"'

    def version(self) -> str:
        """Return the installed version."""
        _import()
        return metadata.version("openvino")

    def lower(
        self,
        exported: Exported,
        directory: Path,
        *,
        formats: Formats | None = None,
        calibration: Sequence[Any] = (),
    ) -> Lowered:
        """Write `model.xml` and `model.bin`, float32 or with the formats realised in int8 (see `Runtime.lower`)."""
        if not formats:
            return self._save(_read(exported.onnx), exported, directory)
        model, exact, unmapped, notes = _quantized(exported, formats, calibration)
        return self._save(model, exported, directory, exact, unmapped, notes)

    def lower_one_line_int8(self, exported: Exported, directory: Path, calibration: Sequence[Any]) -> Lowered:
        """Quantise with `nncf.quantize(model, dataset)` and nothing else."""
        from trimpoint.runtimes import nncf_quantize

        _needs_nncf()
        model = nncf_quantize.quantize_default(_read(exported.onnx), exported.signature, calibration)
        return self._save(model, exported, directory)

    def open(self, directory: Path, lowered: Lowered, *, threads: int = 1, profile: bool = False) -> OpenVinoSession:
        """Compile the model with a fixed number of threads, for latency; in bfloat16 only where its file asks for it.

        Raises:
            ArtifactError: if OpenVINO cannot read the files.
        """
        openvino = _import()
        path = directory / lowered.files["main"][0]
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "PERF_COUNT": profile,
        }
        try:
            core = openvino.Core()
            model = core.read_model(str(path))
            settings[openvino_halves.HINT] = openvino_halves.precision(core, model)
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO cannot open {path.name!r}: {error}") from error
        return OpenVinoSession(lowered.signature, compiled)

    def operators(
        self, directory: Path, lowered: Lowered, inputs: Any, *, threads: int = 1, repeats: int = 50
    ) -> list[OperatorTime]:
        """Return the time of each operator for these inputs, slowest first, from OpenVINO's performance counters."""
        session = self.open(directory, lowered, threads=threads, profile=True)
        arrays = session.flat_inputs(inputs)
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        for turn in range(_WARM_UP + repeats):
            session.run_flat(arrays)
            if turn < _WARM_UP:
                continue
            for entry in session.request.get_profiling_info():
                if entry.real_time.total_seconds() > 0:
                    times[entry.node_name, entry.node_type].append(entry.real_time.total_seconds() * 1e3)
        operators = [
            OperatorTime(name=name, kind=kind, module=_module_of(name, lowered.scopes), ms=median(values))
            for (name, kind), values in times.items()
        ]
        return sorted(operators, key=lambda operator: -operator.ms)

    def _save(
        self,
        model: Any,
        exported: Exported,
        directory: Path,
        exact: frozenset[str] = frozenset(),
        unmapped: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> Lowered:
        openvino = _import()
        path = directory / GRAPH
        try:
            with quiet():
                openvino.save_model(model, str(path), compress_to_fp16=False)
        except RuntimeError as error:
            raise LoweringError(f"OpenVINO cannot write the model: {error}") from error
        _strip(path, exported.signature, exported.scopes, exact)
        return Lowered(
            runtime=self.name,
            files={"main": (GRAPH, WEIGHTS)},
            signature=exported.signature,
            unmapped=unmapped,
            notes=notes,
            scopes=exported.scopes,
        )


def _import() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError("OpenVINO is not installed.", f"`{OpenVino.install}`") from error
    return openvino


def _needs_nncf() -> None:
    if find_spec("nncf") is None:
        raise MissingDependencyError("NNCF, OpenVINO's quantiser, is not installed.", f"`{OpenVino.install}`")


def _quantized(
    exported: Exported, formats: Formats, calibration: Sequence[Any]
) -> tuple[Any, frozenset[str], tuple[str, ...], tuple[str, ...]]:
    """Return the model with its formats realised, operators to keep in float32, what could not be realised, and notes.

    Static formats come first.
    """
    from trimpoint.runtimes import nncf_quantize, onnx_graph, onnx_halves, onnx_quantize, onnx_weights, saturation

    halves, others = onnx_halves.split(formats)
    grouped, others = onnx_weights.split(exported, others)
    each_call = {path: tensors for path, tensors in others.items() if is_dynamic(tensors)}
    before = {path: tensors for path, tensors in others.items() if path not in each_call}
    graph = onnx_graph.parse(exported.onnx)
    unmapped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if before:
        prepared = onnx_quantize.preprocess(graph)
        before, unmapped = _by_channel(prepared, exported, before)
        static = onnx_quantize.select(prepared, exported, before)
        unmapped += tuple(static.unmapped)
        if static.nodes:
            feeds = calibration_feeds(exported.signature, calibration)
            graph = onnx_quantize.quantize(prepared, static, feeds, biases=False)
            onnx_graph.keep_dims(graph)
            found = saturation.saturations(graph, calibration_feeds(exported.signature, calibration))
            notes = tuple(saturation.note(each, _module_of(each.node, exported.scopes)) for each in found)
    unmapped += onnx_weights.compress(graph, exported, grouped, plain=True)
    unmapped += onnx_halves.store(graph, halves, lambda node: _module_of(node.name, exported.scopes))
    model = _read(onnx_graph.serialize(graph))
    if each_call:
        _needs_nncf()
        model, missing = nncf_quantize.compress_weights(model, exported, each_call)
        unmapped += missing
    for kind in {tensors["weight"].dtype for tensors in halves.values()}:
        openvino_halves.store(model, kind)
    int8 = (before.keys() | each_call.keys()) - {text.partition(":")[0] for text in unmapped}
    exact, refused, told = openvino_halves.compute(model, halves, int8, lambda name: _module_of(name, exported.scopes))
    whole = [path for path, tensors in grouped.items() if "input" not in tensors]
    if whole:
        # By default, CPUs with 8-bit dot products round the inputs of products with compressed weights in each call.
        model.set_rt_info(0, [OPTIONS, "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        rounded = sorted(path for path in (*grouped, *each_call) if "input" in formats[path])
        unmapped += tuple(f"{path}: its inputs stay in float32, as those of {whole[0]} do" for path in rounded)
    return model, exact, unmapped + refused, notes + told


def _by_channel(
    graph: Any, exported: Exported, formats: Formats
) -> tuple[dict[str, Mapping[str, Format]], tuple[str, ...]]:
    """Give transposed convolutions that are not in groups a scale per channel, and say so.

    With one scale per tensor the plug-in (2026.4 on AVX2) computes something else: answers differ by a third and more.
    """
    whole = [
        n
        for n in graph.graph.node
        if n.op_type == "ConvTranspose" and all(a.name != "group" or a.i == 1 for a in n.attribute)
    ]
    paths = {exported.scopes.get(node.name, "") for node in whole}
    result, reasons = dict(formats), []
    for path, tensors in formats.items():
        weight = tensors.get("weight")
        if path in paths and weight is not None and weight.granularity == "tensor":
            result[path] = {**tensors, "weight": replace(weight, granularity="channel")}
            reasons.append(f"{path}: its weight has a scale per channel, since OpenVINO's answers are wrong with one")
    return result, tuple(reasons)


def _read(onnx: bytes) -> Any:
    """Return the OpenVINO model of an ONNX graph, with its constants folded.

    `openvino.convert_model` does the same, and reports its use to the vendor; this does not.
    """
    openvino = _import()
    from openvino._offline_transformations import apply_moc_transformations

    try:
        with quiet():
            model = openvino.Core().read_model(onnx)
            apply_moc_transformations(model, False)
            _name_sequences(model)
    except RuntimeError as error:
        reasons = [f"{kind}: {text.strip().splitlines()[-1]}" for kind, text in _REFUSED.findall(str(error))]
        raise LoweringError(
            f"OpenVINO cannot read the exported model: {'; '.join(reasons) or error}",
            "ONNX Runtime may take these operators (`--runtime onnxruntime`); otherwise write them in others",
        ) from error
    return model


def _name_sequences(model: Any) -> None:
    """Name recurrent operators, which reading leaves nameless, after what reads them: so their module is known."""
    for op in model.get_ordered_ops():
        readers = [reader.get_node() for port in op.outputs() for reader in port.get_target_inputs()]
        if op.get_type_name().endswith("Sequence") and readers:
            op.set_friendly_name(f"{readers[0].get_friendly_name()}/{op.get_type_name()}")


def _strip(path: Path, signature: Signature, scopes: Mapping[str, str], exact: frozenset[str]) -> None:
    """Remove from the graph what the plug-in does not read: histories, names of tensors, constants stored twice.

    Operators in `exact` are marked as such, which the plug-in does read.

    Operators that OpenVINO has named itself, by counters that differ from run to run, are named after their position.
    """
    tree = ElementTree.parse(path)
    root = tree.getroot()
    for about in root.findall("rt_info"):
        for child in [child for child in about if child.tag != OPTIONS]:
            about.remove(child)
        if len(about) == 0:
            root.remove(about)
    for layer in root.iter():
        for info in layer.findall("rt_info"):
            for attribute in info.findall("attribute"):
                if attribute.get("name") == "fused_names":
                    info.remove(attribute)
            if len(info) == 0:
                layer.remove(info)
        if layer.get("name") in exact:
            info = ElementTree.SubElement(layer, "rt_info")
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    known = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    for port in root.iter("port"):
        if known.isdisjoint(port.get("names", "").split(",")):
            port.attrib.pop("names", None)
    _share_constants(root)
    for layer in root.iter("layer"):
        if layer.get("type") not in ("Parameter", "Result") and not _module_of(layer.get("name", ""), scopes):
            layer.set("name", f"_{layer.get('id')}")
    for element in root.iter():
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
    root.set("name", "g")
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _share_constants(root: ElementTree.Element) -> None:
    """Leave one layer of all that hold the same bytes as the same shape and type."""
    layers = root.find("layers")
    if layers is None:
        return
    first: dict[str, str] = {}
    other: dict[str, str] = {}
    for layer in layers.findall("layer[@type='Const']"):
        port = layer.find("output/port")
        if port is None or "names" in port.attrib or layer.find("rt_info") is not None:
            continue
        content = "".join(ElementTree.tostring(part, "unicode") for part in layer)
        if content in first:
            other[layer.get("id", "")] = first[content]
            layers.remove(layer)
        else:
            first[content] = layer.get("id", "")
    for edge in root.iter("edge"):
        source = edge.get("from-layer", "")
        edge.set("from-layer", other.get(source, source))


def _module_of(name: str, scopes: Mapping[str, str]) -> str:
    """Return the module of an operator; OpenVINO appends a suffix after a slash to the name of the exported node."""
    return scopes.get(name) or scopes.get(name.partition("/")[0], "")
