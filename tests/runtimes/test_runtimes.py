"""What holds for every runtime."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.runtimes import networks
from trimpoint.data import as_numpy
from trimpoint.errors import ArtifactError, DataError, UnknownNameError
from trimpoint.runtimes import get_runtime, runtime_names
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import check_parity, parity_batches, require_parity
from trimpoint.values import to_data

CASES = ("cnn", "resnet8", "transformer", "lstm", "pair")
SLOW = {"executorch": {False: ("resnet8",), True: ("transformer", "lstm", "pair")}}
"""Runtime → by whether it is int8, the cases left out where lowering takes five to ten seconds each."""
# In one process, which imports ExecuTorch's compiler, and lowers what several tests read, once.
RUNTIMES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in runtime_names()]


def runtimes_and_cases(int8):
    return [
        pytest.param(name, case, marks=pytest.mark.xdist_group(name), id=f"{name}-{case}")
        for name in runtime_names()
        for case in CASES
        if case not in SLOW.get(name, {}).get(int8, ())
    ]


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return get_runtime(request.param)


@pytest.mark.parametrize(("name", "case"), runtimes_and_cases(int8=False))
def test_float32_gives_the_modules_answers_at_every_shape(name, case, cases, lowering):
    module, inputs, _, lengths = cases[case]
    directory, lowered = lowering(name, case)
    session = get_runtime(name).open(directory, lowered)
    batches = parity_batches(inputs(), session, lengths=lengths)
    assert len(batches) == 2 * max(1, len(lengths.get("length", ())))
    parity = require_parity(module, session, batches)
    assert parity.max_rel < 1e-5
    assert parity.agreement == 1
    assert lowered.unmapped == ()
    assert sorted(file.name for file in directory.iterdir()) == sorted(lowered.files["main"])


@pytest.mark.parametrize(("name", "case"), runtimes_and_cases(int8=True))
def test_int8_agrees_with_the_module(name, case, cases, lowering):
    module, inputs, _, _ = cases[case]
    directory, lowered = lowering(name, case, int8=True)
    session = get_runtime(name).open(directory, lowered)
    parity = check_parity(module, session, [inputs(32)])
    # With random weights the two largest entries lie closer together than an int8 step, so only those of the trained
    # network are compared.
    if case == "cnn":
        assert parity.agreement > 0.95
    assert parity.sqnr_db > 10
    assert parity.cosine > 0.95
    assert parity.max_abs > 0
    assert lowered.unmapped == ()


def test_modules_without_formats_stay_in_float32(runtime, cases, lowering, tmp_path):
    module, inputs, exported, _ = cases["cnn"]
    head = {path: formats for path, formats in networks.int8(module).items() if path == "9"}
    only = tmp_path, runtime.lower(exported, tmp_path, formats=head, calibration=[as_numpy(inputs(8))])
    differences, stored = [], []
    x = inputs(64)
    for directory, lowered in (lowering(runtime.name, "cnn"), only, lowering(runtime.name, "cnn", int8=True)):
        differences.append(check_parity(module, runtime.open(directory, lowered), [x]).max_rel)
        stored.append((directory / lowered.files["main"][-1]).stat().st_size)
    assert differences[0] < 1e-5 < min(differences[1:])
    # The convolutions have 1,224 weights, and small files much beside them.
    assert stored[2] < stored[1] - 1224


def test_an_activation_between_an_int8_and_a_float_layer_stays(runtime, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
    x = torch.randn(32, 16)
    formats = {"0": {"weight": networks.WEIGHT, "input": networks.INPUT}}
    exported = export(module, x, {"input": networks.BATCH}, sources=("onnx", "program"))
    lowered = runtime.lower(exported, tmp_path, formats=formats, calibration=[as_numpy(x)])
    parity = check_parity(module, runtime.open(tmp_path, lowered), [x])
    assert lowered.unmapped == ()
    assert 25 < parity.sqnr_db < 80


def test_formats_that_cannot_be_realised_are_listed(runtime, cases, tmp_path):
    module, inputs, exported, _ = cases["lstm"]
    int4 = networks.Format(dtype="int4")
    formats = {"lstm": {"weight": networks.WEIGHT, "input": networks.INPUT}, "head": {"weight": int4, "input": int4}}
    lowered = runtime.lower(exported, tmp_path, formats=formats, calibration=[as_numpy(inputs())])
    reasons = dict(entry.split(": ", 1) for entry in lowered.unmapped)
    assert sorted(reasons) == ["head", "lstm"]
    assert "int4" in reasons["head"]
    require_parity(module, runtime.open(tmp_path, lowered), [inputs()])


def test_one_line_int8(runtime, cases, tmp_path):
    module, inputs, exported, _ = cases["cnn"]
    lowered = runtime.lower_one_line_int8(exported, tmp_path, [as_numpy(inputs(32))])
    assert check_parity(module, runtime.open(tmp_path, lowered), [inputs(64)]).agreement > 0.95


def test_int8_without_calibration_data_is_refused(runtime, cases, tmp_path):
    module, _, exported, _ = cases["cnn"]
    with pytest.raises(DataError, match=r"needs calibration data\. Got none") as caught:
        runtime.lower(exported, tmp_path, formats=networks.int8(module))
    assert "calibrate" in caught.value.hint


def test_calibration_data_of_zeros_alone_is_refused(runtime, cases, tmp_path):
    module, inputs, exported, _ = cases["cnn"]
    zeros = [np.zeros_like(as_numpy(inputs(4))), np.zeros_like(as_numpy(inputs(2)))]
    with pytest.raises(DataError, match="zero throughout") as caught:
        runtime.lower(exported, tmp_path, formats=networks.int8(module), calibration=zeros)
    assert "samples such as the model will see" in caught.value.hint
    one = [*zeros, as_numpy(inputs(1))]
    assert runtime.lower(exported, tmp_path, formats=networks.int8(module), calibration=one).unmapped == ()


def test_calibration_data_that_does_not_fit_is_refused(runtime, cases, tmp_path):
    module, _, exported, _ = cases["cnn"]
    with pytest.raises(DataError, match="must be float32 of shape"):
        runtime.lower(exported, tmp_path, formats=networks.int8(module), calibration=[np.zeros((1, 2), "float32")])


def test_operators_name_their_modules(runtime, cases, lowering):
    inputs = cases["resnet8"][1]
    for int8 in (False, True):
        if "resnet8" in SLOW.get(runtime.name, {}).get(int8, ()):
            continue
        directory, lowered = lowering(runtime.name, "resnet8", int8=int8)
        before = sorted(directory.iterdir())
        operators = runtime.operators(directory, lowered, as_numpy(inputs(1)), repeats=3)
        assert operators == sorted(operators, key=lambda operator: -operator.ms)
        assert all(operator.ms >= 0 for operator in operators)
        known = sum(operator.ms for operator in operators if operator.module)
        assert known > 0.7 * sum(operator.ms for operator in operators)
        # A convolution that was fused with what follows it may go by the latter's name, in the same block.
        blocks = {operator.module.rpartition(".")[0] for operator in operators if "Conv" in operator.kind}
        assert {"stem", "stages.0.0", "stages.2.0"} <= blocks
        assert sorted(directory.iterdir()) == before


def test_sessions_import_nothing_that_they_do_not_need(runtime, cases, lowering, tmp_path):
    inputs = cases["transformer"][1]
    source, lowered = lowering(runtime.name, "transformer")
    for name in lowered.files["main"]:
        shutil.copy(source / name, tmp_path)
    batch = as_numpy(inputs())
    wanted = runtime.open(tmp_path, lowered)(batch)
    np.savez(tmp_path / "inputs.npz", **batch)
    (tmp_path / "lowered.json").write_text(json.dumps(to_data(lowered)))
    script = (
        "import json, sys, pathlib, numpy as np\n"
        "from trimpoint.runtimes import get_runtime\n"
        "from trimpoint.runtimes.base import Lowered\n"
        "from trimpoint.values import from_data\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "lowered = from_data(Lowered, json.loads((here / 'lowered.json').read_text()))\n"
        "session = get_runtime(lowered.runtime).open(here, lowered)\n"
        "np.savez(here / 'outputs.npz', **session(dict(np.load(here / 'inputs.npz'))))\n"
        "heavy = ('torch', 'onnx', 'scipy', 'optuna', 'nncf', 'torchao', 'executorch.exir')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(list(runtime.imports))
    assert run.stderr == ""
    got = np.load(tmp_path / "outputs.npz")
    assert sorted(got) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)


def test_lowering_gives_the_same_bytes_again_and_prints_nothing(runtime, cases, lowering, tmp_path, capfd):
    directory, lowered = lowering(runtime.name, "cnn", int8=True)
    capfd.readouterr()
    torch.manual_seed(0)
    module, inputs, exported, _ = cases["cnn"]
    calibration = [as_numpy(inputs(8)) for _ in range(4)]
    again = runtime.lower(exported, tmp_path, formats=networks.int8(module), calibration=calibration)
    runtime.open(tmp_path, again)(as_numpy(inputs()))
    assert capfd.readouterr() == ("", "")
    found = [[(place / name).read_bytes() for name in lowered.files["main"]] for place in (directory, tmp_path)]
    assert found[0] == found[1]
    debris = (b"site-packages", str(tmp_path).encode(), b"DIR/", b"networks.py", b"nn_module_stack")
    assert all(word not in data for data in found[0] for word in debris)


def test_a_damaged_file_gives_one_clear_error(runtime, lowering, tmp_path):
    _, lowered = lowering(runtime.name, "pair")
    (tmp_path / lowered.files["main"][0]).write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="cannot open 'model"):
        runtime.open(tmp_path, lowered)


def test_outputs_outlive_the_next_call(runtime, cases, lowering):
    inputs = cases["cnn"][1]
    session = runtime.open(*lowering(runtime.name, "cnn"))
    first = session(as_numpy(inputs()))
    kept = first.copy()
    session(as_numpy(inputs()))
    np.testing.assert_array_equal(first, kept)


def test_an_unknown_runtime_is_refused_with_a_suggestion():
    with pytest.raises(UnknownNameError) as caught:
        get_runtime("openvno")
    assert caught.value.hint == "did you mean `openvino`?"


def test_versions(runtime):
    assert runtime.version()[0].isdigit()
