import torch

from trimpoint.measure.static import count_macs
from trimpoint.testing import zoo
from trimpoint.testing.applied import core_answer, inputs_of, relative_error
from trimpoint.testing.artifact_probe import coded_bytes, count_params, file_bytes, probed_original
from trimpoint.testing.artifact_probe import count_macs as count_file_macs


def test_file_of_a_small_network_is_counted_right() -> None:
    model, task = zoo()["cnn"].make()
    probe = probed_original(zoo()["cnn"])
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)
    assert count_params(probe) == weights
    assert count_file_macs(probe) == count_macs(model, inputs_of(task)).total
    assert file_bytes(probe) > 4 * weights
    assert 3 * weights < coded_bytes(probe) < file_bytes(probe)
    assert relative_error(probe.answer(model), core_answer(model, task)) < 1e-5


def test_relative_error_is_a_share_of_the_reference() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.zeros(2, dtype=torch.float64), reference) == 1
    assert relative_error(reference, reference) == 0
