import numpy as np
import pytest

from trimpoint.errors import MeasurementError
from trimpoint.measure.child import peak_rss_bytes
from trimpoint.measure.memory import measure_memory
from trimpoint.measure.process import ArtifactFiles
from trimpoint.target import Target


def test_memory_grows_with_the_weights_and_not_with_the_parent(small, heavy):
    parent = np.ones(60_000_000)  # 480 MB in this process must not show in the measured one
    little = measure_memory(small, Target(), {"": np.zeros((1, 64), np.float32)})
    much = measure_memory(heavy, Target(), {"": np.zeros((1, 2_048), np.float32)})
    weights = 4 * 4 * 2_048 * 2_049
    assert parent.nbytes < peak_rss_bytes()
    assert little.peak_rss_bytes < parent.nbytes
    assert little.increase_bytes < weights / 2
    assert weights * 0.9 < much.increase_bytes < 4 * weights
    assert much.peak_rss_bytes - little.peak_rss_bytes > weights * 0.8
    assert f"{much.increase_bytes:,} bytes above" in much.how


def test_a_file_that_does_not_open_is_a_measurement_error(small, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(MeasurementError, match="cannot open"):
        measure_memory(ArtifactFiles(directory=tmp_path, lowered=small.lowered), Target(), {})


def test_file_bytes_are_those_on_disk(small):
    assert small.bytes == sum(path.stat().st_size for path in small.directory.iterdir())
