"""What the operators of an ExecuTorch program take, from the events that its runtime records.

This module needs `executorch` in full; what opens an artifact does not import it.
"""

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from trimpoint.errors import ArtifactError
from trimpoint.quiet import quiet
from trimpoint.runtimes.base import OperatorTime

with quiet():
    from executorch.devtools import Inspector
    from executorch.exir._serialize._program import deserialize_pte_binary

WEIGHTED = ("Convolution", "Deconvolution", "Fully Connected")
"""What XNNPACK calls its operators with a constant weight."""
_WARM_UP = 3


def operator_times(session: Any, arrays: Sequence[Any], scopes: Mapping[str, str], repeats: int) -> list[OperatorTime]:
    """Return the median time of each operator, slowest first.

    XNNPACK names its operators itself and lists them in the order of the graph: the weighted ones belong to the
    modules in the order in which the delegate was made.

    Args:
        session: loaded with its event tracer.
        arrays: one batch, in the order of the signature's inputs.
        scopes: `delegate.position` of a weighted operator → module.
        repeats: calls that are counted, after a few that are not.

    Raises:
        ArtifactError: if the runtime records no events.
    """
    if not session.program.has_etdump():
        raise ArtifactError("This build of ExecuTorch records no events; times per operator are not available.")
    for _ in range(_WARM_UP + repeats):
        session.run_flat(arrays)
    with tempfile.TemporaryDirectory(prefix="trimpoint-") as name, quiet():
        trace = Path(name) / "trace.etdp"
        session.program.write_etdump_result_to_file(str(trace), str(Path(name) / "debug.bin"))
        blocks = Inspector(etdump_path=str(trace)).event_blocks
    plan = deserialize_pte_binary(session.path.read_bytes()).program.execution_plan[0]
    instructions = [entry.instr_args for entry in plan.chains[0].instructions]
    delegates = [index for index, entry in enumerate(instructions) if hasattr(entry, "delegate_index")]
    times: list[OperatorTime] = []
    positions: dict[int, int] = defaultdict(int)
    for event in (event for block in blocks if block.name == "Execute" for event in block.events):
        index = event._instruction_id
        if event.perf_data is None or index is None or not 0 <= index < len(instructions):
            continue
        ms = median(event.perf_data.raw[_WARM_UP:])
        if event.name == "OPERATOR_CALL":
            times.append(OperatorTime(name=str(index), kind=_kernel(plan, instructions[index]), module="", ms=ms))
        elif event.delegate_debug_identifier is not None:
            kind, number = event.name.partition(" #")[0], delegates.index(index)
            place = ""
            if kind.startswith(WEIGHTED):
                place = f"{number}.{positions[number]}"
                positions[number] += 1
            module = scopes.get(place, "")
            times.append(OperatorTime(name=f"{number}: {event.name}", kind=kind, module=module, ms=ms))
    return sorted(times, key=lambda operator: -operator.ms)


def _kernel(plan: Any, entry: Any) -> str:
    index = getattr(entry, "op_index", None)
    return "" if index is None else str(plan.operators[index].name).removeprefix("aten::")
