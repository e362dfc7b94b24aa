import pytest

from peftlab.catalog.claims import CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.source}: {c.says}")
def test_a_claim_holds_or_says_why_not(claim):
    off = abs(claim.computed() - claim.claimed) / claim.claimed
    assert claim.why and claim.source
    if claim.differs:
        assert off > 0.05
    else:
        assert off < 0.01


def test_both_calculators_have_claims_and_some_differ():
    assert {c.tab for c in CLAIMS} == {"memory", "lora"}
    assert any(c.differs for c in CLAIMS) and not all(c.differs for c in CLAIMS)
