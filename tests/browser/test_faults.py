"""Whatever visitors do while answers are late, fail or are lost, the page ends up as Python says, and its address too."""

import pytest

pytest.importorskip("playwright")
from faults import Server, sequence


@pytest.mark.parametrize("seed", range(3))
def test_the_page_ends_up_right(app, chromium, seed):
    wrong = sequence(chromium, Server(app.url), seed)
    assert not wrong, "\n".join(wrong)
