import pytest
from torch import nn

from trimpoint.method import Fact
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.parts import Block
from trimpoint.plan import Step
from trimpoint.progress import SILENT
from trimpoint.runtimes.base import OperatorTime
from trimpoint.search.probe import probe

BLOCKS = tuple(Block(path=f"blocks.{i}", shape=(1, 8), params=100, family="a") for i in range(4))
LEAVES = {**{f"blocks.{i}.conv": 100 for i in range(4)}, "head": 100}


class Machine:
    """A machine on which time is a power of the forecast, and quantisation multiplies."""

    def __init__(self, exponent=1.0, quantised=0.5, smaller=0.5, blocks=BLOCKS):
        self.exponent, self.quantised, self.smaller = exponent, quantised, smaller
        self.found, self.leaves, self.asked = blocks, LEAVES, []
        self.model = nn.Identity()

    def blocks(self):
        return self.found

    def groups(self):
        return ()

    def shape(self, plan):
        self.asked.append(str(plan))
        latency = size = 1.0
        for step in plan.steps:
            if isinstance(step.method, DropBlocks):
                left = 1 - len(step.method.blocks) / (len(BLOCKS) + 1)
                latency, size = latency * left**self.exponent, size * left
            else:
                latency, size = latency * self.quantised, size * self.smaller
        return {"latency_ms": latency, "file_bytes": size}

    def operators(self, plan):
        assert not any(step.method.traits.removes is Fact.PRESENT for step in plan.steps)
        return [OperatorTime(name=path, kind="Conv", module=path, ms=1.0) for path in LEAVES]


def run(machine, kinds=(DropBlocks,), quantisers=(QuantizeStatic,), memory=None, aims=()):
    memory = {} if memory is None else memory

    def decide(key, make):
        if key not in memory:
            memory[key] = make()
        return memory[key]

    return probe(machine, kinds, quantisers, aims=aims, decide=decide, progress=SILENT)


def test_a_quantiser_that_pays_is_taken_and_shapes_are_measured_with_it():
    machine = Machine()
    found = run(machine)
    assert found.quantiser == QuantizeStatic()
    assert not found.left_out
    assert all("quantize" in plan for plan in machine.asked)


def test_a_quantiser_that_does_not_pay_is_left_out_with_its_figures():
    machine = Machine(quantised=1.6, smaller=0.8)
    found = run(machine)
    assert found.quantiser is None
    assert "latency_ms 1.60" in found.left_out["quantize-static"]
    assert all("quantize" not in plan for plan in machine.asked[1:])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_forecasts_are_carried_to_what_was_measured(exponent):
    found = run(Machine(exponent=exponent))
    assert len(found.structures) == 5
    for structure in found.structures:
        gone = len(structure.steps[0].method.blocks) if structure.steps else 0
        assert structure.gains["latency_ms"] == pytest.approx((1 - gone / 5) ** exponent)
        assert structure.gains["file_bytes"] == pytest.approx(1 - gone / 5)


def test_a_kind_of_change_that_brings_nothing_is_left_out():
    class Deaf(Machine):
        def shape(self, plan):
            measured = super().shape(plan)
            dropped = any(isinstance(step.method, DropBlocks) for step in plan.steps)
            return dict.fromkeys(measured, 0.5) if dropped else measured

    found = run(Deaf())
    assert "does not pay" in found.left_out["drop-blocks"]
    assert [s.steps for s in found.structures] == [()]


def test_a_method_that_finds_nothing_to_change_is_left_out():
    found = run(Machine(blocks=()), kinds=(DropBlocks, PruneChannels))
    assert set(found.left_out) == {"drop-blocks", "prune-channels"}
    assert "nothing in this model" in found.left_out["drop-blocks"]


def test_what_was_recorded_is_not_measured_again():
    memory = {}
    first = run(Machine(exponent=0.7), memory=memory)
    machine = Machine(exponent=1.3)
    second = run(machine, memory=memory)
    assert machine.asked == []
    assert second == first


def test_rows_show_forecasts_beside_measurements():
    rows = run(Machine(exponent=0.5)).rows
    drops = [row for row in rows if "forecast_latency_ms" in row]
    assert len(drops) == 2
    for row in drops:
        assert row["latency_ms"] / 0.5 == pytest.approx(row["forecast_latency_ms"] ** 0.5)


def test_a_shape_that_cannot_be_measured_is_left_out_with_what_was_raised():
    class Fragile(Machine):
        def shape(self, plan):
            if any(isinstance(step.method, QuantizeStatic) for step in plan.steps):
                raise RuntimeError("no kernel")
            return super().shape(plan)

        def operators(self, plan):
            raise RuntimeError("no profile")

    memory = {}
    for _ in range(2):  # The second time from what was recorded.
        found = run(Fragile(), memory=memory)
        assert found.quantiser is None
        assert "no kernel" in found.left_out[str(Step(QuantizeStatic()))]
        assert len(found.structures) == 5


def test_a_method_none_of_whose_shapes_can_be_measured_is_left_out():
    class Fragile(Machine):
        def shape(self, plan):
            if any(isinstance(step.method, DropBlocks) for step in plan.steps):
                raise ValueError("cannot be exported")
            return super().shape(plan)

    found = run(Fragile())
    assert found.left_out["drop-blocks"] == "none of its shapes could be measured"
    assert [s.steps for s in found.structures] == [()]


def test_what_pays_is_judged_by_what_the_goal_minimises():
    slower = {"quantised": 1.5, "smaller": 0.25}
    assert run(Machine(**slower)).quantiser == QuantizeStatic()
    assert run(Machine(**slower), aims=("file_bytes", "macs")).quantiser == QuantizeStatic()
    found = run(Machine(**slower), aims=("latency_ms",))
    assert found.quantiser is None
    assert all(s.merit == pytest.approx(s.gains["latency_ms"]) for s in found.structures)
    assert run(Machine(**slower), aims=("macs",)).quantiser == QuantizeStatic()
