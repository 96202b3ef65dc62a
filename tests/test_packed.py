"""Artifacts as one coded file; `parts` and its network are those of the tests of artifacts."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import trimpoint
from trimpoint.artifact import open_artifact, verify_artifact, write_artifact
from trimpoint.cli import main
from trimpoint.errors import ArtifactError, StorageError
from trimpoint.manifest import MANIFEST, digest_of
from trimpoint.packed import pack_artifact, unpack_artifact
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.values import Measurement, Profile


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def artifact(request, tmp_path_factory) -> Path:
    """An artifact of a small network of which most weights are zero."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out") / "small"
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(60, 90), torch.nn.ReLU(), torch.nn.Linear(90, 10)).eval()
    for layer in (network[0], network[2]):
        layer.weight.data[torch.rand(layer.weight.shape) < 0.9] = 0.0
    x = torch.randn(4, 60)
    runtime = get_runtime(request.param)
    lowered = runtime.lower(export(network, x, {"input": {0: "batch"}}), source)
    expected = runtime.open(source, lowered)(x.numpy())
    profile = Profile({"file_bytes": Measurement(value=1, unit="bytes")})
    labels = source / "labels.txt"
    labels.write_text("one\ntwo\n")
    write_artifact(
        out,
        source_dir=source,
        lowered=lowered,
        parity=[(x.numpy(), expected)],
        plan=Plan().to_data(),
        profile=profile,
        extra={"labels.txt": labels},
    )
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_packed_artifact_is_restored_opened_and_verified(artifact: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = pack_artifact(artifact, tmp_path / "a.tpz", on_step=lambda done, total: steps.append((done, total)))
    assert report.coded_bytes == (tmp_path / "a.tpz").stat().st_size < report.bytes / 2
    assert report.files == len(contents(artifact))
    assert steps[-1] == (report.bytes, report.bytes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tpz"]

    restored = unpack_artifact(tmp_path / "a.tpz", tmp_path / "b")
    assert contents(tmp_path / "b") == contents(artifact)
    assert restored.digest == report.digest
    assert not restored.model_only

    model, plain = open_artifact(tmp_path / "a.tpz"), open_artifact(artifact)
    x = np.random.default_rng(0).normal(size=(3, 60)).astype(np.float32)
    np.testing.assert_array_equal(model(x), plain(x))
    assert model.profile == plain.profile
    found = verify_artifact(tmp_path / "a.tpz", digest_of(artifact))
    assert (found.cases, found.directory) == (1, str(tmp_path / "a.tpz"))
    with pytest.raises(ArtifactError, match="must have the digest"):
        verify_artifact(tmp_path / "a.tpz", "0" * 64)


def test_a_model_packed_alone_is_smaller_and_runs(artifact: Path, tmp_path: Path) -> None:
    whole = pack_artifact(artifact, tmp_path / "a.tpz")
    report = pack_artifact(artifact, tmp_path / "m.tpz", model_only=True)
    assert report.model_only
    assert report.coded_bytes < whole.coded_bytes
    x = np.random.default_rng(0).normal(size=(3, 60)).astype(np.float32)
    model = trimpoint.open(tmp_path / "m.tpz")
    np.testing.assert_array_equal(model(x), open_artifact(artifact)(x))
    assert (dict(model.profile), model.certificate) == ({}, None)
    found = verify_artifact(tmp_path / "m.tpz", report.digest)
    assert found.cases == 0
    assert "no recorded answers" in found.notes[0]
    with pytest.raises(ArtifactError, match="must have the digest"):
        verify_artifact(tmp_path / "m.tpz", "0" * 64)
    unpack_artifact(tmp_path / "m.tpz", tmp_path / "files")
    model_files = {name: data for name, data in contents(artifact).items() if name in contents(tmp_path / "files")}
    assert contents(tmp_path / "files") == model_files
    assert all(name.startswith("model.") for name in model_files)


def test_what_is_no_artifact_or_no_coded_file_is_refused(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(ArtifactError, match="It is something else"):
        pack_artifact(artifact, other)
    with pytest.raises(ArtifactError, match="must be the directory of an artifact"):
        pack_artifact(tmp_path, tmp_path / "a.tpz")
    before = contents(artifact)
    with pytest.raises(ArtifactError, match="must lie outside of the artifact"):
        pack_artifact(artifact, artifact / "extra" / "a.tpz")
    assert contents(artifact) == before
    for read in (open_artifact, verify_artifact, lambda path: unpack_artifact(path, tmp_path / "out")):
        with pytest.raises(ArtifactError, match="must be a coded file") as caught:
            read(other)
        assert "trimpoint pack" in caught.value.hint
    with pytest.raises(ArtifactError, match="There is none"):
        unpack_artifact(tmp_path / "none.tpz", tmp_path / "out")
    pack_artifact(artifact, tmp_path / "a.tpz")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="must be new, empty or an artifact"):
        unpack_artifact(tmp_path / "a.tpz", full)
    assert contents(full) == {"thesis.tex": b"mine"}
    with pytest.raises(ArtifactError, match="at most 100 bytes together"):
        unpack_artifact(tmp_path / "a.tpz", tmp_path / "out", max_bytes=100)
    assert other.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tpz", "full", "notes.txt"]


def test_a_changed_artifact_is_not_packed_and_an_older_file_stays(artifact: Path, tmp_path: Path) -> None:
    pack_artifact(artifact, tmp_path / "a.tpz")
    before = (tmp_path / "a.tpz").read_bytes()
    unpack_artifact(tmp_path / "a.tpz", tmp_path / "b")
    unpack_artifact(tmp_path / "a.tpz", tmp_path / "b")
    (tmp_path / "b" / "plan.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"plan\.json"):
        pack_artifact(tmp_path / "b", tmp_path / "a.tpz")
    assert (tmp_path / "a.tpz").read_bytes() == before
    (tmp_path / "a.tpz").write_bytes(before[:-7])
    for read in (open_artifact, verify_artifact):
        with pytest.raises(ArtifactError, match="cut off or was changed"):
            read(tmp_path / "a.tpz")


FULL = """
import resource, sys
from trimpoint.artifact import open_artifact
from trimpoint.errors import StorageError
from trimpoint.packed import pack_artifact, unpack_artifact
artifact, file, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for work in (lambda: pack_artifact(artifact, file), lambda: unpack_artifact(file, out), lambda: open_artifact(file)):
    try:
        work()
    except StorageError as error:
        print(error.message)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs limits of the system")
def test_on_a_full_disk_an_older_file_stays_and_nothing_half_written(artifact: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "a.tpz", tmp_path / "b"
    pack_artifact(artifact, file)
    before = file.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(artifact), str(file), str(out)], capture_output=True, text=True, timeout=120
    )
    said = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in said] == [
        "'a.tpz' could not be written",
        "'b' could not be written",
        f"'a.tpz' could not be restored in {tempfile.gettempdir()}",
    ], done.stderr
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.tpz"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a directory that cannot be written to")
def test_where_nothing_can_be_written_it_is_said(artifact: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="could not be written"):
        pack_artifact(artifact, tmp_path / "a.tpz")


def test_the_verbs_pack_verify_and_unpack(artifact: Path, tmp_path: Path, capsys) -> None:
    file, out = str(tmp_path / "a.tpz"), str(tmp_path / "b")
    assert main(["pack", str(artifact), "-o", file, "--format", "json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert packed["coded_bytes"] == Path(file).stat().st_size
    assert main(["verify", file, "--digest", digest_of(artifact)]) == 0
    assert main(["unpack", file, "-o", out]) == 0
    shown = capsys.readouterr()
    assert "times smaller" in shown.out
    assert "unpacking" in shown.err
    assert (Path(out) / MANIFEST).read_bytes() == (artifact / MANIFEST).read_bytes()
    assert main(["unpack", file, "-o", out, "--max-bytes", "10", "--quiet"]) == 1
    assert "--max-bytes" in capsys.readouterr().err
    assert main(["verify", file, "--baseline", str(artifact)]) == 2
    assert "unpack it first" in capsys.readouterr().err
    Path(file).write_bytes(Path(file).read_bytes()[:-1])
    assert main(["verify", file]) == 4
    assert main(["pack", out, "-o", str(tmp_path / "m.tpz"), "--model-only"]) == 0
    assert (tmp_path / "m.tpz").stat().st_size < packed["coded_bytes"]
