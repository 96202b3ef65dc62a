"""The contract of a runtime. Nothing here imports torch: opening an artifact needs numpy and the runtime only."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trimpoint.errors import DataError
from trimpoint.quantization.grid import Grid, GroupGrid
from trimpoint.signature import Signature, check_inputs, flatten, unflatten
from trimpoint.values import Format

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Source = Literal["onnx", "program"]
"""What a runtime lowers: a serialised ONNX model, or the `ExportedProgram` that this is made of."""

Formats = Mapping[str, Mapping[str, Format]]
"""Module path → tensor (`"weight"`, `"input"`, `"output"`) → number format."""


def is_dynamic(tensors: Mapping[str, Format]) -> bool:
    """Return whether the formats of a module need nothing observed: ranges of each call, or an embedding's rows."""
    weight = tensors.get("weight")
    rows = weight is not None and weight.granularity == "channel" and "input" not in tensors
    return rows or any(format.dynamic for format in tensors.values())


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A module traced once, in the forms that were asked for.

    Args:
        signature: its inputs and outputs.
        onnx: the serialised ONNX model, without debris (stack traces, source paths); empty where it was not asked for.
        scopes: ONNX node name → path of the module that it came from.
        program: the trace itself, with the parameters under `module.`; never changed by a runtime.
        notes: what is not as it was asked for, such as a dimension that had to stay fixed, each with its reason.
        grids: path of a module → the integers that its weight consists of, where a method chose them.
        ranges: path of a module → the range of its input, where training learned it.
    """

    signature: Signature
    onnx: bytes = b""
    scopes: Mapping[str, str] = field(default_factory=dict)
    program: "ExportedProgram | None" = None
    notes: tuple[str, ...] = ()
    grids: Mapping[str, Grid | GroupGrid] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What a runtime made of an exported module.

    Args:
        runtime: name of the runtime.
        files: graph name → file names, all in one directory; what the runtime loads and nothing else.
        signature: inputs and outputs.
        unmapped: `path: reason` for formats that could not be realised.
        scopes: name of a node in the runtime's files → path of the module that it came from.
        notes: what else is to be known: a dimension that the runtime cannot leave open, what another machine may do.
    """

    runtime: str
    files: Mapping[str, tuple[str, ...]]
    signature: Signature
    unmapped: tuple[str, ...] = ()
    scopes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """Time that one operator takes in one call.

    Args:
        name: of the node in the runtime's graph.
        kind: of operator, in the runtime's terms.
        module: path of the module that it came from; empty where unknown.
        ms: median time in one call, milliseconds.
    """

    name: str
    kind: str
    module: str
    ms: float


def calibration_feeds(signature: Signature, calibration: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield input name → array for each calibration batch.

    Args:
        signature: of the model.
        calibration: batches of inputs in the module's structure.

    Raises:
        DataError: if there are none, one does not fit the signature, or all of them are zero throughout: no range of
            values can be taken from that. That is told behind the last.
    """
    if len(calibration) == 0:
        raise DataError(
            "Static int8 needs calibration data. Got none.", "give the task a `calibrate` role, a few hundred samples"
        )
    told = False
    for batch in calibration:
        arrays = flat_inputs(signature, batch)
        told = told or any(array.any() for array in arrays)
        yield dict(zip([spec.name for spec in signature.inputs], arrays, strict=True))
    if not told:
        raise DataError(
            "The calibration data are zero throughout: no range of values can be taken from them.",
            "give samples such as the model will see, prepared as it was trained with them",
        )


def flat_inputs(signature: Signature, inputs: Any) -> list[Any]:
    """Return the arrays of a batch in the order of the signature, checked; mappings are taken by name.

    Raises:
        DataError: if the inputs do not fit the signature.
    """
    names = [spec.name for spec in signature.inputs]
    by_name = isinstance(inputs, Mapping) and set(names) <= set(inputs)
    leaves = [inputs[name] for name in names] if by_name else flatten(inputs)
    check_inputs(signature.inputs, leaves, signature.limits)
    return leaves


class Session(ABC):
    """A model opened in a runtime. It takes and returns the module's own structure, as CPU NumPy arrays."""

    def __init__(self, runtime: str, signature: Signature) -> None:
        self.runtime = runtime
        self.signature = signature

    def __call__(self, inputs: Any) -> Any:
        """Run one batch.

        Args:
            inputs: a tensor, tuple or mapping of arrays, as the module takes them.

        Raises:
            DataError: if the inputs do not fit the signature.
        """
        return unflatten(self.signature.output_structure, self.run_flat(self.flat_inputs(inputs)))

    def flat_inputs(self, inputs: Any) -> list[Any]:
        """Return the arrays in the order of the signature, checked; mappings are taken by name."""
        return flat_inputs(self.signature, inputs)

    @abstractmethod
    def run_flat(self, arrays: Sequence[Any]) -> list[Any]:
        """Run arrays in the order of the signature's inputs; return those of its outputs."""


class Runtime(ABC):
    """One inference runtime: how it realises, opens and profiles a model.

    A class says what it is called, how it is installed, which form of an export it lowers (`source`), and which
    packages its sessions import besides NumPy and its own (`imports`): those a measuring process must allow.
    """

    name: ClassVar[str]
    install: ClassVar[str]
    source: ClassVar[Source] = "onnx"
    imports: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def version(self) -> str:
        """Return the installed version.

        Raises:
            MissingDependencyError: if the runtime is not installed; the hint says what to install.
        """

    @abstractmethod
    def lower(
        self,
        exported: Exported,
        directory: Path,
        *,
        formats: Formats | None = None,
        calibration: Sequence[Any] = (),
    ) -> Lowered:
        """Write the runtime's files into `directory`.

        Args:
            exported: what to lower.
            directory: exists and is empty.
            formats: number formats to realise with the runtime's own quantiser; none is float32 throughout.
            calibration: batches of inputs, as NumPy arrays in the module's structure; needed for static formats.

        Raises:
            LoweringError: if the runtime cannot realise the graph.
            DataError: if static formats are asked for without calibration data.
        """

    @abstractmethod
    def lower_one_line_int8(self, exported: Exported, directory: Path, calibration: Sequence[Any]) -> Lowered:
        """Quantise with the runtime's own one-line int8 and its defaults: what every search must beat."""

    @abstractmethod
    def open(self, directory: Path, lowered: Lowered, *, threads: int = 1, profile: bool = False) -> Session:
        """Open lowered files for inference with a fixed number of threads, float32 where they are float32."""

    @abstractmethod
    def operators(
        self, directory: Path, lowered: Lowered, inputs: Any, *, threads: int = 1, repeats: int = 50
    ) -> list[OperatorTime]:
        """Return the time of each operator for these inputs, slowest first."""
