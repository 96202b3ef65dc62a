"""Plans: content hash, order, TOML and JSON; and recipes that are none."""

import hashlib
import itertools
import json

import pytest

from trimpoint.errors import InvalidParameterError, PlanError, TrimpointError, UnknownNameError
from trimpoint.filters import parse
from trimpoint.method import Stage
from trimpoint.plan import Plan, Step
from trimpoint.registry import all_methods, make_method

METHODS = sorted(all_methods())


def plan_of(*names, seed=0):
    return Plan(tuple(Step(make_method(name, {})) for name in names), seed)


FULL = Plan(
    (
        Step(make_method("drop-blocks", {}), parse("stages.* & !type:Linear")),
        Step(make_method("finetune", {})),
        Step(make_method("quantize-static", {})),
    ),
    seed=7,
)


def test_there_and_back():
    assert Plan.from_data(json.loads(json.dumps(FULL.to_data()))) == FULL
    assert Plan.from_toml(FULL.to_toml()) == FULL
    assert Plan.from_toml("") == Plan()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_there_and_back(name):
    plan = plan_of(name)
    assert Plan.from_data(json.loads(json.dumps(plan.to_data()))) == plan
    assert Plan.from_toml(plan.to_toml()) == plan
    assert name in str(plan)


def test_the_hash_is_that_of_the_content():
    assert len(FULL.hash) == 64
    assert Plan.from_toml(FULL.to_toml()).hash == FULL.hash
    others = [
        Plan(FULL.steps, seed=8),
        FULL.prefix(2),
        Plan((Step(FULL.steps[0].method), *FULL.steps[1:]), seed=7),
        Plan((FULL.steps[1], FULL.steps[0], FULL.steps[2]), seed=7),
    ]
    assert len({plan.hash for plan in [FULL, *others]}) == 5
    # Written down once: a changed canonical form would orphan every stored study.
    assert Plan().hash == hashlib.sha256(b'{"seed":0,"steps":[]}').hexdigest()


def test_prefix_and_then():
    assert FULL.prefix(0) == Plan(seed=7)
    assert FULL.prefix(1).then(*FULL.steps[1:]) == FULL
    assert Plan().then(FULL.steps[1].method).steps == (Step(FULL.steps[1].method),)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(METHODS, 2)))
def test_order_follows_the_stages(first, second):
    plan = plan_of(first, second)
    stages = [step.method.traits.stage for step in plan.steps]
    if Stage.RECOVER in stages or stages[0] <= stages[1]:
        plan.check_order()
    else:
        with pytest.raises(PlanError, match=f"`{second}` .* must stand before `{first}`") as caught:
            plan.check_order()
        assert caught.value.hint
        with pytest.raises(PlanError, match="must stand before"):
            Plan.from_data(plan.to_data())


def test_all_problems_at_once():
    with pytest.raises(PlanError, match=r"(?s)1\. `drop-blocks`.*2\. `prune-channels`"):
        plan_of("quantize-static", "drop-blocks", "prune-channels").check_order()


def test_class_variables_are_no_parameters():
    assert str(Step(make_method("prune-channels", {}))) == "prune-channels()"


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "prune-channels",
            {"round_to": None},
            "'round_to' parameter of PruneChannels must be a whole number. Got None",
        ),
        ("prune-weights", {"ratio": None}, "must be a number. Got None"),
        ("prune-channels", {"round_to": 2.0}, "must be a whole number. Got 2.0"),
        ("prune-channels", {"round_to": True}, "must be a whole number. Got True"),
        ("prune-vocabulary", {"unknown": 1.5}, "must be a whole number or None. Got 1.5"),
        ("finetune", {"lr": "fast"}, "must be a number or None. Got 'fast'"),
        ("drop-blocks", {"blocks": [1, 2]}, "must be a tuple of texts"),
        ("drop-blocks", {"blocks": "a"}, "must be a tuple of texts"),
        ("quantize-static", {"reduce_range": 1}, "must be true or false"),
    ],
)
def test_values_must_have_the_type_that_a_parameter_is_declared_with(name, params, message):
    with pytest.raises(InvalidParameterError, match=message):
        make_method(name, params)


def test_none_stands_where_it_is_the_default_and_whole_numbers_are_numbers():
    assert make_method("prune-vocabulary", {"unknown": None}).params["unknown"] is None
    assert make_method("finetune", {"lr": None, "epochs": 2}).params["epochs"] == 2


def test_as_text():
    assert str(Plan()) == "unmodified"
    assert str(plan_of("finetune", "quantize-static")) == "finetune() → quantize-static()"
    assert "at stages.* & !type:Linear" in str(FULL)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("steps = 3", PlanError, "must be a list of tables"),
        ("steps = [3]", PlanError, "must be a list of tables"),
        ("seed = 1.5", PlanError, "`seed` of a plan must be a whole number"),
        ("seed = true", PlanError, "`seed` of a plan must be a whole number"),
        ("sede = 1", UnknownNameError, "no key 'sede'"),
        ("[[steps]]\nratio = 1", PlanError, "must name its `method`"),
        ("[[steps]]\nmethod = 'drop-block'", UnknownNameError, "no method 'drop-block'"),
        ("[[steps]]\nmethod = 'drop-blocks'\nratoi = 1", UnknownNameError, "no parameter 'ratoi'"),
        ("[[steps]]\nmethod = 'drop-blocks'\nwhere = 'a &'", InvalidParameterError, "cannot be read"),
        ("[[steps]", PlanError, "no valid TOML"),
    ],
)
def test_recipes_that_are_none(text, error, message):
    with pytest.raises(error, match=message):
        Plan.from_toml(text)


@pytest.mark.parametrize("step", [{"method": 3}, {"method": ["drop-blocks"]}, {"method": "finetune", "where": 3}])
def test_steps_of_the_wrong_type(step):
    with pytest.raises(PlanError, match="of a step must be text"):
        Plan.from_data({"steps": [step]})


def test_where_is_read_from_text():
    assert Step(make_method("finetune", {}), "layers.*") == Step(make_method("finetune", {}), parse("layers.*"))
    with pytest.raises(TrimpointError):
        Step(make_method("finetune", {}), "layers.* &")
