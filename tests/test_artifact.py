import errno
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trimpoint import artifact as module
from trimpoint.artifact import (
    ArtifactWarning,
    Tolerance,
    manifest_digest,
    open_artifact,
    verify_artifact,
    write_artifact,
)
from trimpoint.errors import ArtifactError, DataError, StorageError
from trimpoint.manifest import MANIFEST
from trimpoint.measure.environment import environment, instruction_set
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.values import Certificate, Measurement, Profile


class TwoInputs(nn.Module):
    """A mapping in, a mapping out, a named dynamic length."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids, mask):
        hidden = self.embed(ids) * mask.unsqueeze(-1)
        return {"logits": self.head(hidden.mean(1)), "hidden": hidden}


def measured(latency, size):
    return Profile(
        {
            "latency_ms": Measurement(value=latency, unit="ms", low=latency * 0.9, high=latency * 1.1),
            "file_bytes": Measurement(value=size, unit="bytes"),
        }
    )


def certificate():
    runtime = get_runtime("onnxruntime")
    return Certificate(
        status="passed",
        score="accuracy",
        margin=0.01,
        drop=0.002,
        upper=0.0055,
        level=0.95,
        n=10_000,
        baseline=0.93,
        value=0.928,
        runtime=f"onnxruntime {runtime.version()}",
        instruction_set=instruction_set(),
    )


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """What an artifact is made of, as keyword arguments."""
    source = tmp_path_factory.mktemp("source")
    inputs = {"ids": torch.arange(12).reshape(2, 6) % 20, "mask": torch.ones(2, 6)}
    dims = {name: {0: "batch", 1: "length"} for name in inputs}
    runtime = get_runtime("onnxruntime")
    lowered = runtime.lower(export(TwoInputs(), inputs, dims), source)
    session = runtime.open(source, lowered)
    cases = []
    for batch, length in ((1, 3), (2, 6), (4, 11)):
        rng = np.random.default_rng(length)
        value = {"ids": rng.integers(0, 20, (batch, length)), "mask": np.ones((batch, length), np.float32)}
        cases.append((value, session(value)))
    labels = tmp_path_factory.mktemp("extra") / "labels.txt"
    labels.write_text("a\nb\nc\n")
    rebuild = tmp_path_factory.mktemp("rebuild")
    (rebuild / "structure.json").write_text("{}")
    return {
        "source_dir": source,
        "lowered": lowered,
        "parity": cases,
        "plan": {"seed": 0, "steps": [{"method": "drop-blocks", "ratio": 0.3}]},
        "profile": measured(0.31, 71_000),
        "baseline": measured(1.2, 1_151_000),
        "certificate": certificate(),
        "extra": {"labels.txt": labels},
        "rebuild": rebuild,
    }


@pytest.fixture
def artifact(parts, tmp_path):
    write_artifact(tmp_path / "best", **parts)
    return tmp_path / "best"


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_it_holds_what_it_should(artifact, parts):
    names = {path.relative_to(artifact).as_posix() for path in files_of(artifact)}
    assert names == {
        "README.md",
        "certificate.json",
        "environment.json",
        "extra/labels.txt",
        "manifest.json",
        "model.onnx",
        "parity.safetensors",
        "plan.json",
        "profile.json",
        "rebuild/structure.json",
    }
    assert (artifact / "model.onnx").read_bytes() == (parts["source_dir"] / "model.onnx").read_bytes()
    assert json.loads((artifact / "environment.json").read_text()) == environment()
    assert [path.name for path in artifact.parent.iterdir()] == ["best"]


def test_opened_it_answers_as_the_module(artifact, parts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = open_artifact(artifact)
    inputs = {"ids": torch.randint(0, 20, (3, 7)), "mask": torch.ones(3, 7)}
    with torch.no_grad():
        expected = TwoInputs()(**inputs)
    for given in (inputs, {name: value.numpy() for name, value in inputs.items()}):
        outputs = model(given)
        assert set(outputs) == {"logits", "hidden"}
        np.testing.assert_allclose(outputs["logits"], expected["logits"].numpy(), atol=1e-5)
    assert model.profile == parts["profile"]
    assert model.baseline == parts["baseline"]
    assert model.certificate == parts["certificate"]
    assert model.signature == parts["lowered"].signature
    assert model.plan == parts["plan"]
    assert model.manifest["format"] == 1
    with pytest.raises(DataError, match="must be int64"):
        model({"ids": np.zeros((1, 2), np.int32), "mask": np.ones((1, 2), np.float32)})


def test_a_sound_artifact_verifies(artifact):
    report = verify_artifact(artifact, manifest_digest(artifact))
    assert report.files == len(files_of(artifact))
    assert report.bytes == sum(path.stat().st_size for path in files_of(artifact))
    assert (report.cases, report.notes) == (3, ())
    assert report.largest_error <= 1e-6
    assert verify_artifact(artifact, clean_process=False).digest == report.digest
    with pytest.raises(ArtifactError, match="must have the digest 00"):
        verify_artifact(artifact, "00")


def test_the_same_parts_give_the_same_digest(parts, tmp_path):
    first, second = (write_artifact(tmp_path / str(i), **(parts | {"readme": "x"})) for i in range(2))
    assert first == second == manifest_digest(tmp_path / "0")


def test_any_changed_byte_is_found_and_its_file_named(artifact):
    rng = np.random.default_rng(0)
    for path in files_of(artifact):
        original = path.read_bytes()
        for position in {0, len(original) - 1, *rng.integers(0, len(original), 6).tolist()}:
            changed = bytearray(original)
            changed[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match=path.name):
                verify_artifact(artifact, clean_process=False)
            with pytest.raises(ArtifactError, match=path.name):
                open_artifact(artifact)
        path.write_bytes(original[:-1])
        with pytest.raises(ArtifactError, match=path.name):
            open_artifact(artifact)
        path.write_bytes(original)
    verify_artifact(artifact, clean_process=False)


def test_every_byte_of_the_manifest_counts(artifact):
    path = artifact / MANIFEST
    original = path.read_bytes()
    for position in range(0, len(original), 7):
        changed = bytearray(original)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            open_artifact(artifact)


def test_missing_and_added_files_are_all_named(artifact):
    (artifact / "README.md").unlink()
    (artifact / "extra" / "more.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"1\. README\.md is missing\.\n2\. extra/more\.txt does not belong"):
        verify_artifact(artifact)


def test_links_are_refused(artifact, tmp_path):
    outside = tmp_path / "outside.json"
    shutil.move(artifact / "plan.json", outside)
    (artifact / "plan.json").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"plan\.json must be a plain file"):
        verify_artifact(artifact)


_OUTSIDE = ("../secret", "/etc/passwd", "a/../../b", "C:\\x", "a\\b", "./a", "a/", "", "manifest.json")
_NOT_PORTABLE = ("a\tb", "con", "extra/LPT1.txt", "a ", "é" * 128, "\ud800")
PATHS = dict.fromkeys((*_OUTSIDE, *_NOT_PORTABLE), "plain paths within the artifact")
PATHS |= dict.fromkeys(("Plan.json", "PLAN.JSON/a", "Manifest.json", "plan.json/a"), "others on every system")


@pytest.mark.parametrize("name", PATHS)
def test_paths_out_of_the_artifact_or_not_on_every_system_are_refused(artifact, name):
    from trimpoint.manifest import _content

    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["checksum"]
    manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
    (artifact / MANIFEST).write_bytes(_content(manifest))
    with pytest.raises(ArtifactError, match=PATHS[name]):
        open_artifact(artifact)


def test_a_newer_format_says_to_update(artifact):
    from trimpoint.manifest import _content

    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["checksum"]
    (artifact / MANIFEST).write_bytes(_content(manifest | {"format": 2}))
    with pytest.raises(ArtifactError, match=r"must have the format 1\. Got 2"):
        open_artifact(artifact)


def test_other_answers_than_recorded_are_found(parts, tmp_path):
    wrong = [(inputs, {**outputs, "logits": outputs["logits"] + 0.01}) for inputs, outputs in parts["parity"]]
    write_artifact(tmp_path / "a", **(parts | {"parity": wrong}))
    with pytest.raises(ArtifactError, match=r"'logits' must be as recorded.*Got a difference of 0\.01"):
        verify_artifact(tmp_path / "a")
    write_artifact(tmp_path / "a", **(parts | {"parity": wrong, "tolerance": Tolerance(atol=0.02)}))
    assert verify_artifact(tmp_path / "a").largest_error == pytest.approx(0.01, abs=1e-5)


def test_a_model_that_does_not_open_is_an_artifact_error(parts, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.onnx").write_bytes(b"nothing")
    write_artifact(tmp_path / "a", **(parts | {"source_dir": source}))
    with pytest.raises(ArtifactError, match="does not run in a clean process"):
        verify_artifact(tmp_path / "a")


def test_another_machine_or_version_is_a_warning(parts, tmp_path):
    other = replace(parts["certificate"], instruction_set="neon", runtime="onnxruntime 1.0")
    write_artifact(tmp_path / "a", **(parts | {"certificate": other}))
    with pytest.warns(ArtifactWarning) as caught:
        open_artifact(tmp_path / "a")
    assert len(caught) == 2
    assert "instruction set 'neon'" in str(caught[0].message)
    assert len(verify_artifact(tmp_path / "a", clean_process=False).notes) == 2


def test_an_older_artifact_is_replaced_and_nothing_else_ever(parts, artifact, tmp_path):
    digest = write_artifact(artifact, **(parts | {"certificate": None}))
    assert manifest_digest(artifact) == digest
    assert open_artifact(artifact).certificate is None
    (tmp_path / "empty").mkdir()
    write_artifact(tmp_path / "empty", **parts)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="left alone"):
        write_artifact(thesis, **parts)
    with pytest.raises(ArtifactError, match="left alone"):
        write_artifact(thesis / "chapter.txt", **parts)
    assert (thesis / "chapter.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "empty", "thesis"]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["_write", "_copy", "put_in_place", "sync"])
def test_a_full_disk_leaves_the_old_artifact_and_nothing_half_written(parts, artifact, tmp_path, monkeypatch, failing):
    before = manifest_digest(artifact)
    if failing == "put_in_place":
        monkeypatch.setattr(module, failing, lambda *_, **__: full_disk())
    else:
        monkeypatch.setattr(module, failing, full_disk)
    for name in ("best", "new"):
        with pytest.raises(StorageError, match="No space left on device") as caught:
            write_artifact(tmp_path / name, **parts)
        assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert verify_artifact(artifact, clean_process=False).digest == before


def test_a_failed_replacement_puts_the_old_artifact_back(parts, artifact, tmp_path, monkeypatch):
    before, rename, calls = manifest_digest(artifact), Path.rename, []

    def second_fails(self, target):
        calls.append(target)
        if len(calls) == 2:
            full_disk()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(StorageError):
        write_artifact(artifact, **parts)
    monkeypatch.undo()
    assert manifest_digest(artifact) == before
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_place_that_cannot_be_written_is_a_storage_error(parts, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not be written"):
        write_artifact(tmp_path / "file" / "best", **parts)


def test_reserved_names_are_refused(parts, tmp_path):
    lowered = replace(parts["lowered"], files={"main": ("plan.json",)})
    with pytest.raises(ArtifactError, match=r"may not be called 'plan\.json'"):
        write_artifact(tmp_path / "a", **(parts | {"lowered": lowered}))
    with pytest.raises(ArtifactError, match="plain paths"):
        write_artifact(tmp_path / "a", **(parts | {"extra": {"../../out.txt": parts["extra"]["labels.txt"]}}))
    with pytest.raises(ArtifactError, match=r"Got 'extra/Labels\.txt'"):
        write_artifact(tmp_path / "a", **(parts | {"extra": dict.fromkeys(("labels.txt", "Labels.txt"), __file__)}))
    assert list(tmp_path.iterdir()) == []


LIGHT = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxscript", "scipy", "optuna", "psutil", "filelock"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Forbid())
import numpy as np
import trimpoint

model = trimpoint.open(sys.argv[1])
out = model({"ids": np.zeros((1, 2), np.int64), "mask": np.ones((1, 2), np.float32)})
report = trimpoint.verify(sys.argv[1])
print(out["logits"].shape, report.cases, "torch" in sys.modules)
"""


def test_the_light_half_is_enough_to_open_and_verify(artifact):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(artifact)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "(1, 3) 3 False"


def test_the_model_card_says_it_and_its_code_runs(artifact):
    card = (artifact / "README.md").read_text()
    assert "`drop-blocks`" in card
    assert "| file_bytes | 1,151,000 bytes | 71,000 bytes | 0.062× |" in card
    assert "a drop of 0.002, at most 0.0055 with 95.0% confidence, where 0.01 was allowed" in card
    assert "- `extra/labels.txt`" in card
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        assert len(block.strip().splitlines()) <= 6
        done = subprocess.run(
            [sys.executable, "-c", block + "\nprint(len(outputs))"],
            cwd=artifact,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.stdout.strip() == "2", done.stderr
