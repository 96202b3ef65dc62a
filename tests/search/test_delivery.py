import pytest

from tests.search.trials import BASELINE, trial
from trimpoint.errors import StudyError
from trimpoint.measure.process import ArtifactFiles
from trimpoint.runtimes.base import Lowered
from trimpoint.search.delivery import STAGE, files_of, rebuild_of
from trimpoint.signature import Signature


def test_files_that_are_gone_are_told(tmp_path):
    for made in (BASELINE, trial(3)):
        with pytest.raises(StudyError, match=f"The files of trial {made.number} are gone"):
            files_of(tmp_path, made)


def test_what_rebuilds_is_that_of_the_stage_it_comes_from(tmp_path):
    lowered = Lowered(
        runtime="onnxruntime",
        files={},
        signature=Signature(inputs=(), outputs=(), input_structure=None, output_structure=None),
    )
    files = ArtifactFiles(directory=tmp_path / "store" / "lowered", lowered=lowered)
    files.directory.mkdir(parents=True)
    assert rebuild_of(tmp_path, files) is None
    (files.directory / STAGE).write_text('{"stage": "abc"}')
    assert rebuild_of(tmp_path, files) is None
    (tmp_path / "store" / "abc" / "rebuild").mkdir(parents=True)
    assert rebuild_of(tmp_path, files) == tmp_path / "store" / "abc" / "rebuild"
