"""Every method of the package against every check that its traits call for."""

from trimpoint.registry import all_methods
from trimpoint.testing import parametrize_with_checks

test_method = parametrize_with_checks(all_methods())


def test_all_five_methods_are_covered() -> None:
    cases = test_method.pytestmark[0].args[1]
    methods = {case.values[0].name for case in cases}
    assert {"distill", "drop-blocks", "finetune", "prune-channels", "quantize-static"} <= methods
    assert methods == set(all_methods())
