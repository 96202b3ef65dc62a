"""What a figure depends on besides the model: the processor, its instruction set, the versions of what runs it.

Names no host, no user and no path. Imports nothing heavy: versions are read from the installed metadata.
"""

import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("trimpoint", "numpy", "onnxruntime", "openvino", "nncf", "executorch", "torchao", "torch")
RELEVANT = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_ARM = {"asimd": "neon", "asimddp": "neon_dot", "i8mm": "neon_i8mm", "sve": "sve", "bf16": "neon_bf16"}
_NUMPY = {"AVX2": "avx2", "AVX512F": "avx512f", "AVX512_ICL": "avx512_vnni", "ASIMD": "neon", "ASIMDDP": "neon_dot"}


def environment() -> dict[str, str]:
    """Return the processor, cores, instruction set, operating system and versions, name → value.

    Example:
        >>> {"cores", "cpu", "instruction_set"} <= set(environment())
        True
    """
    described = {
        "cpu": cpu_name(),
        "cores": str(os.cpu_count() or 1),
        "instruction_set": instruction_set(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return described | {name: version for name in PACKAGES if (version := installed_version(name))}


def installed_version(package: str) -> str:
    """Return the version of an installed distribution, or an empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def instruction_set() -> str:
    """Return the vector extensions that decide speed and int8 results, sorted and separated by spaces.

    Linux tells all of them; elsewhere those that NumPy detects.
    """
    flags = set(_cpuinfo().get("flags", "").split())
    features = set(_cpuinfo().get("features", "").split())
    found = {name for name in RELEVANT if name in flags} | {_ARM[name] for name in features & set(_ARM)}
    return " ".join(sorted(found or _from_numpy())) or platform.machine()


@cache
def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _from_numpy() -> set[str]:
    import numpy as np

    config = np.show_config(mode="dicts")
    extensions = config.get("SIMD Extensions", {}) if isinstance(config, dict) else {}
    found = [*extensions.get("baseline", ()), *extensions.get("found", ())]
    return {_NUMPY[name] for name in found if name in _NUMPY}


@cache
def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entry of the Linux file; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip().lower(): value.strip() for key, value in pairs}
