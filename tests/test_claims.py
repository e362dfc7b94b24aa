from decimal import Decimal
from itertools import groupby

import pytest

from peftlab import RunSpec, SpecError, count, resolve, units
from peftlab.base.models import UNITS
from peftlab.lectures.claims import CLAIMS

QV = "q_proj,v_proj"


def holds(claim):
    """Whether the exact number is in the claimed range, or rounds to the claimed one at as many digits as it gives."""
    computed = claim.computed()
    if claim.least is not None:
        return claim.least <= computed <= claim.claimed
    digits = len(Decimal(str(claim.claimed)).normalize().as_tuple().digits)
    return float(f"{computed:.{digits - 1}e}") == claim.claimed


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.source}: {c.says}")
def test_a_claim_holds_or_says_why_not(claim):
    assert claim.why and claim.source and claim.unit in ("bytes", "parameters", "percent")
    assert holds(claim) != claim.differs


def test_both_calculators_have_claims_and_some_differ():
    assert {c.tab for c in CLAIMS} == {"memory", "lora"}
    assert any(c.differs for c in CLAIMS) and not all(c.differs for c in CLAIMS)


def test_the_lora_claims_read_table_by_table():
    tables = [source for source, _ in groupby(c.source for c in CLAIMS if c.tab == "lora")]
    assert len(tables) == len(set(tables))


def says(text):
    return next(c for c in CLAIMS if c.tab == "lora" and c.says == text)


def trained(model, rank, targets=QV, **rest):
    return count(resolve(RunSpec(model=model, rank=rank, target_modules=targets, **rest)))


def share(report):
    return units.percent(report.trainable_percent / 100)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_the_gemma_rows_differ_for_the_reason_given(rank):
    row, percent = says(f"Gemma 3 270M, rank {rank}"), says(f"share of Gemma 3 270M, rank {rank}")
    assert f"{row.computed() / row.claimed:.1f} times low" in row.why
    assert f"{trained('gemma-3-270m', rank, 'all-linear').trainable_parameters:,}" in row.why
    assert share(trained("llama-2-7b", rank)) in percent.why
    assert row.claimed == pytest.approx(percent.claimed / 100 * 270e6, rel=0.02)  # the one is made from the other


def test_the_reasons_of_the_larger_rows_add_up():
    fewer = trained("gemma-3-270m", 64)
    assert (
        f"{fewer.total_parameters / fewer.trainable_parameters:.0f} times fewer"
        in says("share of Gemma 3 270M, rank 64").why
    )
    seven = says("share of 7B, rank 64")
    assert round(says("7B, rank 64").claimed / 7e9 * 100, 2) == seven.claimed
    assert f"{trained('llama-2-7b', 64).total_parameters:,}" in seven.why
    seventy = says("70B, rank 64")
    assert seventy.claimed == pytest.approx(0.48e-2 * 70e9)
    attention = {m.role: m for m in trained("llama-2-70b", 64).modules if m.role in ("query", "value")}
    width = attention["query"].d_in
    assert f"{4 * 64 * 2 * width * attention['query'].layers:,}" in seventy.why
    assert attention["value"].d_out < width == attention["query"].d_out
    file = says("the adapter file")
    assert f"make {units.size(4 * says('Gemma 3 270M, rank 64').claimed)};" in file.why
    assert f"the exact {fewer.trainable_parameters:,} make {units.size(file.computed())}" in file.why


ASIDES = {
    "Adapters": {"model": "llama-2-70b", "method": "houlsby"},
    "LoRA, rank 64": {"model": "llama-2-7b", "rank": 64},
    "Prompt tuning": {"model": "gpt2", "method": "prompt"},
    "Prefix tuning": {"model": "bert-base", "method": "prefix"},
    "BERT-Large": {"model": "bert-large", "method": "bitfit", "train_norms": True},
    "PEFT updates 500M of 100B": {"model": "gpt3-175b", "rank": 8},
    "IA³": {"model": "llama-2-7b", "method": "ia3"},
    "selective: q and v only, rank 8": {"model": "gemma-3-270m", "rank": 8, "target_modules": QV},
    "selective: q and v of the last 4 layers, rank 8": {"model": "llama-2-7b", "rank": 8, "target_modules": QV},
}


@pytest.mark.parametrize("row", ASIDES)
def test_a_second_number_in_a_reason_is_counted_too(row):
    assert share(count(resolve(RunSpec(**ASIDES[row])))) in says(row).why


def test_bitfit_trains_nothing_where_the_reason_says_so():
    for model in ("llama-3.1-8b", "gemma-3-270m", "smollm2-135m"):
        with pytest.raises(SpecError, match="no bias"):
            count(resolve(RunSpec(model=model, method="bitfit")))


TABLE = """Gemma 3 270M 8 160K 0.06%
Gemma 3 270M 16 320K 0.12%
Gemma 3 270M 64 1.3M 0.48%
7B 8 4.2M 0.06%
7B 64 33.6M 0.48%
70B 64 336M 0.48%"""
"""LoRA Parameter Counts for Gemma 3 270M, as the lecture prints it: model, rank, parameters, % of the original."""


@pytest.mark.parametrize("row", TABLE.splitlines())
def test_every_row_of_the_lectures_table_is_here(row):
    model, rank, number, percent = row.rsplit(" ", 3)
    assert says(f"{model}, rank {rank}").claimed == pytest.approx(float(number[:-1]) * UNITS[number[-1]])
    assert says(f"share of {model}, rank {rank}").claimed == float(percent.rstrip("%"))
