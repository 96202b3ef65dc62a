import pytest


@pytest.mark.xdist_group("together")
def test_a_worker_is_given_whole_groups(request):
    """What tests of a group share is made once; versions of pytest and pytest-xdist that disagree drop the groups."""
    spread = not request.config.getoption("loadgroup", default=False)
    assert spread or request.node.nodeid.endswith("@together")
