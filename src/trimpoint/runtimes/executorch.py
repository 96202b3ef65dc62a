"""ExecuTorch on the CPU, delegated to XNNPACK."""

import io
import weakref
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trimpoint.errors import ArtifactError, LoweringError, MissingDependencyError
from trimpoint.runtimes.base import Exported, Formats, Lowered, OperatorTime, Runtime, Session, Source
from trimpoint.signature import Signature

FILE = "model.pte"
_METHOD = "forward"


class ExecutorchSession(Session):
    """A program loaded by ExecuTorch. Its Python runtime takes and returns tensors of PyTorch.

    Threads are those of one pool for the whole process, which must not change while a program is loaded. So a session
    that finds the pool at another size, because another one was opened or run since, first unloads all programs.
    """

    def __init__(self, signature: Signature, path: Path, threads: int) -> None:
        super().__init__("executorch", signature)
        self.path, self.threads = path, threads
        self.program: Any = None
        self.method: Any = None
        _OPEN.add(self)
        self.load()

    def load(self, *, profile: bool = False) -> None:
        """Load the program, with the process's pool at the threads of this session.

        Raises:
            ArtifactError: if ExecuTorch cannot read the file, or lacks an operator that it needs.
        """
        runtime, log = _import(), io.StringIO()
        try:
            with redirect_stderr(log):
                if runtime._threadpool_get_thread_count() != self.threads:
                    for session in _OPEN:
                        session.program = session.method = None
                    runtime._unsafe_reset_threadpool(self.threads)
                self.program = runtime._load_program(str(self.path), enable_etdump=profile)
                self.method = self.program.load_method(_METHOD)
        except RuntimeError as error:
            self.program = self.method = None
            reason = _reason(log.getvalue()) or str(error)
            raise ArtifactError(f"ExecuTorch cannot open {self.path.name!r}: {reason}") from error

    def run_flat(self, arrays: Sequence[Any]) -> list[Any]:
        """Run arrays in the order of the signature's inputs; return copies of its outputs.

        Raises:
            ArtifactError: if ExecuTorch refuses them.
        """
        from torch import from_numpy

        if self.method is None:
            self.load()
        tensors = [from_numpy(array if array.flags.writeable else array.copy()) for array in map(_in_order, arrays)]
        try:
            outputs = self.method.call(tensors)
        except RuntimeError as error:
            raise ArtifactError(
                f"ExecuTorch cannot run {self.path.name!r} on these inputs: {error}",
                "what its kernels lack, such as convolutions over three dimensions, shows here: choose another runtime",
            ) from error
        return [output.numpy() for output in outputs]


_OPEN: "weakref.WeakSet[ExecutorchSession]" = weakref.WeakSet()


class Executorch(Runtime):
    """ExecuTorch with its XNNPACK backend; what that has no kernel for runs by ExecuTorch's own operators.

    It takes the traced program, not the ONNX graph. Int8 is PT2E quantisation with the backend's own quantiser, on
    the modules that have formats and on what lies between them, before lowering. Memory is planned when the file is
    made, so open dimensions have a largest size, `Signature.limits`.

    References:
        https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-overview.html
    """

    name: ClassVar[str] = "executorch"
    install: ClassVar[str] = 'pip install "trimpoint[executorch]"'
    source: ClassVar[Source] = "program"
    imports: ClassVar[tuple[str, ...]] = ("torch",)

    def version(self) -> str:
        """Return the installed version."""
        _import()
        return metadata.version("executorch")

    def lower(
        self,
        exported: Exported,
        directory: Path,
        *,
        formats: Formats | None = None,
        calibration: Sequence[Any] = (),
    ) -> Lowered:
        """Write `model.pte`, float32 or with the formats realised in int8 (see `Runtime.lower`)."""
        program = _program(exported)
        unmapped: tuple[str, ...] = ()
        owners: dict[str, str] = {}
        if formats:
            from trimpoint.runtimes import pt2e_quantize

            program, unmapped, owners = pt2e_quantize.quantize(program, exported, formats, calibration)
        return self._save(program, exported, directory, unmapped, owners)

    def lower_one_line_int8(self, exported: Exported, directory: Path, calibration: Sequence[Any]) -> Lowered:
        """Quantise all that the XNNPACK quantiser knows, with its static setting for a scale per channel."""
        program = _program(exported)
        from trimpoint.runtimes import pt2e_quantize

        program, owners = pt2e_quantize.quantize_default(program, exported.signature, calibration)
        return self._save(program, exported, directory, (), owners)

    def open(self, directory: Path, lowered: Lowered, *, threads: int = 1, profile: bool = False) -> ExecutorchSession:
        """Load `model.pte` with a fixed number of threads.

        Raises:
            ArtifactError: if ExecuTorch cannot read the file, or lacks an operator that it needs.
        """
        session = ExecutorchSession(lowered.signature, directory / lowered.files["main"][0], threads)
        if profile:
            session.load(profile=True)
        return session

    def operators(
        self, directory: Path, lowered: Lowered, inputs: Any, *, threads: int = 1, repeats: int = 50
    ) -> list[OperatorTime]:
        """Return the time of each operator for these inputs, slowest first, from ExecuTorch's event tracer."""
        from trimpoint.runtimes import executorch_profile

        session = self.open(directory, lowered, threads=threads, profile=True)
        return executorch_profile.operator_times(session, session.flat_inputs(inputs), lowered.scopes, repeats)

    def _save(
        self,
        program: Any,
        exported: Exported,
        directory: Path,
        unmapped: tuple[str, ...],
        owners: dict[str, str],
    ) -> Lowered:
        from trimpoint.runtimes import executorch_lower

        compiled = executorch_lower.compile_program(program, exported.signature, owners)
        (directory / FILE).write_bytes(compiled.data)
        lowered = Lowered(
            runtime=self.name,
            files={"main": (FILE,)},
            signature=compiled.signature,
            unmapped=unmapped,
            scopes=compiled.scopes,
            notes=compiled.notes,
        )
        try:
            # What the runtime lacks shows only when the file is loaded.
            self.open(directory, lowered)
        except ArtifactError as error:
            raise LoweringError(
                f"ExecuTorch has made a file that it cannot open: {error.message}",
                "choose another runtime, or export only the part that it can run with `Task(core=...)`",
            ) from error
        return lowered


def _import() -> Any:
    """Return ExecuTorch's runtime: the extension itself, since the module around it imports all that lowers models."""
    if find_spec("executorch") is None:
        raise MissingDependencyError("ExecuTorch is not installed.", f"`{Executorch.install}`")
    try:
        import torch  # noqa: F401 – the extension links to its libraries
    except ImportError as error:
        raise MissingDependencyError(
            "ExecuTorch's Python runtime takes tensors of PyTorch, which is not installed.", f"`{Executorch.install}`"
        ) from error
    try:
        from executorch.extension.pybindings import _C
    except ImportError as error:
        raise MissingDependencyError(
            f"ExecuTorch's Python runtime does not fit the installed PyTorch: {error}", f"`{Executorch.install}`"
        ) from error
    return _C


def _program(exported: Exported) -> Any:
    if find_spec("executorch") is None:
        raise MissingDependencyError("ExecuTorch is not installed.", f"`{Executorch.install}`")
    if exported.program is None:
        raise LoweringError(
            "ExecuTorch lowers the traced program of a model, which this export does not hold.",
            'export with `sources=("program",)`, as `Runtime.source` says',
        )
    return exported.program


def _in_order(array: Any) -> "np.ndarray[Any, Any]":
    return np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)


def _reason(log: str) -> str:
    """Return what the runtime has logged of an error, on one line."""
    lines = [line.partition("] ")[2] for line in log.splitlines() if line.startswith("[method.cpp")]
    return "; ".join(lines)[:400]
