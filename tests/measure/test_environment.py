import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trimpoint.measure import environment as module
from trimpoint.measure.environment import environment, instruction_set


def test_it_names_what_matters_and_nobody():
    described = environment()
    assert described["onnxruntime"] == metadata.version("onnxruntime")
    assert described["torch"] == metadata.version("torch")
    assert described["cores"] == str(os.cpu_count())
    text = json.dumps(described)
    assert platform.node() not in text.replace(described["cpu"], "")
    assert str(Path.home()) not in text


def test_the_instruction_set_agrees_with_numpys_detection():
    found = set(instruction_set().split())
    assert not module._from_numpy() - found - {"neon"}


@pytest.mark.parametrize(
    ("text", "expected", "cpu"),
    [
        (
            "model name\t: Xeon\nflags\t\t: sse avx2 avx512f avx512_vnni amx_int8\n\nmodel name: other",
            "amx_int8 avx2 avx512_vnni avx512f",
            "Xeon",
        ),
        ("processor : 0\nFeatures : fp asimd asimddp i8mm\n", "neon neon_dot neon_i8mm", None),
    ],
)
def test_it_reads_linux_files(monkeypatch, text, expected, cpu):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    for function in (module._cpuinfo, module.instruction_set, module.cpu_name):
        function.cache_clear()
    try:
        assert instruction_set() == expected
        if cpu:
            assert module.cpu_name() == cpu
    finally:
        monkeypatch.undo()
        for function in (module._cpuinfo, module.instruction_set, module.cpu_name):
            function.cache_clear()


def test_it_is_light():
    code = (
        "import sys; from trimpoint.measure.environment import environment\n"
        "environment(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
