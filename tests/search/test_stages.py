import pytest
import torch

from tests.end_to_end import tiny
from trimpoint.compress import compress
from trimpoint.errors import StudyError
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.search.stages import load_stage, save_stage, stage_data

PLAN = Plan((Step(DropBlocks(ratio=0.34)), Step(Finetune(epochs=0.5, lr=1e-3)), Step(QuantizeStatic())), 3)


@pytest.fixture(scope="module")
def made():
    return compress(tiny.untrained(), PLAN, tiny.task())


def test_a_stage_comes_back_as_it_was(made, tmp_path):
    save_stage(made, tmp_path, 1.5)
    back = load_stage(tmp_path, tiny.untrained(), PLAN)
    for name in ("plan", "changes", "edits", "formats", "origins", "facts", "effort"):
        assert getattr(back, name) == getattr(made, name), name
    x = torch.randn(5, 8)
    assert torch.equal(back.module(x), made.module(x))
    assert not back.module.training
    assert stage_data(tmp_path)["seconds"] == 1.5


def test_going_on_from_a_stored_stage_gives_the_same_bytes(tmp_path):
    prefix, task, model = PLAN.prefix(1), tiny.task(), tiny.untrained()
    save_stage(compress(model, prefix, task), tmp_path, 0.0)
    resumed = compress(model, PLAN, task, start=load_stage(tmp_path, model, prefix))
    whole = compress(model, PLAN, task)
    for one, other in zip(resumed.module.state_dict().items(), whole.module.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_the_model_is_not_changed_by_loading(made, tmp_path):
    save_stage(made, tmp_path, 0.0)
    model = tiny.untrained()
    load_stage(tmp_path, model, PLAN)
    for one, other in zip(model.parameters(), tiny.untrained().parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_stage_of_another_plan_is_refused(made, tmp_path):
    save_stage(made, tmp_path, 0.0)
    with pytest.raises(StudyError, match="comes from another plan"):
        load_stage(tmp_path, tiny.untrained(), PLAN.prefix(2))
