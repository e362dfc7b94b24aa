"""What work on a shared GPU is said to take, and what is asked for, beside what it took in processes that were new to a GPU."""

import pytest
from tiny import small

from peftlab import RunSpec, adapters, measured, resolve
from peftlab.bench import fresh
from peftlab.places import ASSETS
from peftlab.room import quota
from peftlab.spec import Resolved

(RECORDED,) = measured.documents("fresh")


def asks(what: str, spec: Resolved) -> quota.Asks:
    adapter = adapters.read(ASSETS / "adapters" / "ticket-lora-r8").spec.but(gpu=spec.gpu)
    if what in ("train", "score"):
        return quota.of_job(what, {"spec": spec.to_dict()})
    return quota.of_answers(adapter, fresh.ANSWER.max_new_tokens) if what == "ask" else quota.of_proof(adapter)


@pytest.mark.parametrize("row", RECORDED["rows"], ids=lambda row: row["what"])
def test_what_is_asked_for_is_at_least_one_and_a_half_times_what_it_takes(row):
    spec = resolve(RunSpec.from_dict(RECORDED["spec"]))
    seconds = quota.asked(quota.seconds(asks(row["what"], spec)))
    assert 1.5 * max(row["seconds"]) <= seconds <= 20


def test_three_runs_of_the_default_fit_into_a_day_on_zerogpu():
    spec = resolve(RunSpec.from_dict(RECORDED["spec"] | {"gpu": "rtx-pro-6000"}))
    train = quota.asked(quota.seconds(asks("train", spec)))
    assert train <= 20 and 3 * train <= quota.LONGEST


def test_a_race_asks_for_all_its_runs_and_no_more_than_a_day_has(tiny_model):
    run = small(tiny_model, "lora", gpu="rtx-pro-6000", task="ticket", sequence_length=64)
    one, other = run.to_dict(), run.to_dict() | {"steps": 50 * run.steps}

    def race(*racers, seeds=1, seconds=None):
        named = [(str(n), racer) for n, racer in enumerate(racers)]
        told = {"spec": racers[0], "racers": named, "seeds": seeds, "seconds": seconds}
        return quota.seconds(quota.of_job("race", told))

    beginning = quota.seconds(quota.of_job("train", {"spec": one})) - (alone := race(one, seeds=2) - race(one))
    assert race(one, one) - beginning == pytest.approx(2 * alone)
    assert race(other, seconds=alone / 100) < race(other)
    assert quota.asked(race(*[other] * 24, seeds=5)) <= quota.LONGEST
    assert quota.asked(10**6) == quota.LONGEST
