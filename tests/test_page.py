"""What the page takes from visitors: links that round-trip, and no way to this machine's files."""

import random
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")

import app
from demos import page
from peftlab import RunSpec, SpecError
from peftlab.memory import CONVENTIONS


def test_links_round_trip():
    draw = random.Random(0)
    for _ in range(50):
        spec = page.OPENING.but(
            model=draw.choice(["gpt2", "llama-2-7b", "100B"]),
            rank=draw.randint(1, 300),
            alpha=draw.choice([None, 0.5, 16.0]),
            task=draw.choice([None, "voice"]),
            layers=draw.choice([None, "first:4", "0-3,7"]),
        )
        convention = draw.choice([*CONVENTIONS, "exact"])
        race = draw.choice(["", "lesson=rank&sort=forgetting", "values=lora;full&seeds=3"])
        params = dict(pair.split("=") for pair in app.to_link(spec, convention, race).split("&"))
        params = {name: value.replace("%3A", ":").replace("%2C", ",") for name, value in params.items()}
        assert app.from_link(params | {"tab": "lora", "__theme": "dark"}) == (spec, convention, race, "lora", "")


def test_the_opening_needs_no_query():
    assert app.to_link(page.OPENING, page.CONVENTION) == ""
    assert app.from_link({}) == (None, page.CONVENTION, "", None, "")


@pytest.mark.parametrize(
    "params", [{"rank": "0"}, {"nosuch": "1"}, {"convention": "3n"}, {"task": "/etc/hosts"}, {"lesson": "x"}]
)
def test_a_bad_link_says_what_is_wrong(params):
    spec, convention, race, _, problem = app.from_link(params)
    assert (
        spec is None
        and race == ""
        and convention == page.CONVENTION
        and problem.startswith("This link cannot be read: ")
    )


@pytest.mark.parametrize("model", ["/etc/passwd", "../shared", "assets/tasks", "app.py", "~/.bashrc"])
def test_no_visitor_names_a_file(model):
    with pytest.raises(SpecError, match="no such model"):
        page.public({"model": model})


def test_hub_ids_and_counts_pass():
    for model in ("HuggingFaceTB/SmolLM2-135M", "1.5b", "gpt2"):
        assert page.public({"model": model}) == RunSpec(model=model)


R8, R32, R64 = (page.OPENING.but(rank=rank) for rank in (8, 32, 64))


@pytest.fixture
def me():
    return SimpleNamespace(session_hash=object())


def to(spec):
    """A change of the settings."""
    return page.changing("memory", lambda: (spec, f"rank {spec.rank}"))


def view(show=lambda spec, *inputs: (f"rank {spec.rank}", *inputs), tab="lora"):
    return page.View(tab, show, [None])


def never() -> bool:
    return False


def is_skipped(answer) -> bool:
    return all(part == gr.skip() for part in answer)


def test_a_slow_look_does_not_undo_a_change_made_meanwhile(me):
    def look(changer):
        return page.visitor(me).look(view(lambda spec: (to(R32)(changer), f"rank {spec.rank}")), never, R64)

    assert look(SimpleNamespace(session_hash=object()))[-1] == "rank 64"  # somebody else's change
    page.visitor(me).made(R64, ["memory"])
    assert is_skipped(look(me))


def test_a_look_draws_what_its_tab_does_not_show_yet(me):
    to(R32)(me)  # on the memory tab, which draws itself
    look = page.visitor(me).look
    assert is_skipped(look(view(tab="memory"), never, R32, ("8n",)))
    assert look(view(), never, R32) == ("rank 32",)
    assert is_skipped(look(view(), never, R32))
    assert look(view(), never, R32, ("8n",)) == ("rank 32", "8n")


def test_a_tab_that_nothing_has_changed_is_left_as_it_opened(me):
    """A page selects its own tab when it loads; an answer to that would undo what an early visitor has just chosen."""
    assert is_skipped(page.visitor(me).look(view(), never, page.OPENING, ("8n",)))


def test_a_look_that_another_look_overtook_shows_nothing(me):
    """It was sent before a lesson set how the memory is counted."""
    who, answers = page.visitor(me), []
    to(R32)(me)
    early = who.looks(1.0)

    def slowly(spec, convention):
        answers.append(who.look(view(), who.looks(2.0), R32, ("8n",)))
        return (convention,)

    assert is_skipped(who.look(view(slowly), early, R32, ("12n",)))
    assert answers == [("rank 32", "8n")]
    assert early() and who.looks(1.5)() and not who.looks(2.0)()


def test_a_look_sent_before_a_change_and_heard_after_it_shows_nothing(me):
    to(R32)(me)
    assert is_skipped(page.visitor(me).look(view(), never, R8))
    assert page.visitor(me).look(view(), never, R32) == ("rank 32",)  # the one that follows every change


@pytest.mark.parametrize("screen", ["", " 1700000000000", "lora", "lora now", "one two 3"])
def test_a_look_without_a_tab_is_answered_with_nothing(screen, me):
    answer = app.look(me, screen, page.OPENING, "", page.CONVENTION)
    assert is_skipped(answer) and len(answer) == 2 + len(app.every_output)
    assert app.arrived(me, screen) is None


def test_exact_figures_of_settings_that_a_link_has_replaced_are_not_wanted(me):
    """A page asks for them as it opens; the link's settings may be made before the asking is heard."""
    to(R32)(me)
    assert page.visitor(me).trace(R8)()
    assert not page.visitor(me).trace(R32)()


def test_of_two_traces_the_later_one_stands(me):
    first, second = page.visitor(me).trace(R8), page.visitor(me).trace(R8)
    assert first() and not second()


def test_of_two_changes_the_later_one_stands(me):
    answers = []

    def slowly():
        answers.append(to(R32)(me))
        return (R8, "rank 8")

    assert is_skipped(page.changing("memory", slowly)(me))
    assert answers == [(R32, "rank 32")]
    assert not page.visitor(me).trace(R32)()


def test_a_refused_change_drops_nobody_elses_answer(me):
    """The exact figures on their way stay wanted: nothing else would ask for them again."""

    def impossible():
        raise SpecError("rank=0: no")

    wanted = page.visitor(me).trace(R8)
    answer = page.changing("memory", page.refusing(impossible, 2))(me)
    assert answer[0] == "rank=0: no" and is_skipped(answer[1:])
    assert not wanted()


def test_what_a_change_draws_while_an_earlier_answer_is_under_way_is_drawn_again(me):
    """They may reach the page in either order."""
    who = page.visitor(me)
    to(R32)(me)
    assert who.look(view(), never, R32) == ("rank 32",)  # and is on its way
    page.changing("lora", lambda: (R64, "rank 64"))(me)
    assert who.look(view(), never, R64) == ("rank 64",)
    who.arrived("lora")
    page.changing("lora", lambda: (R8, "rank 8"))(me)
    assert is_skipped(who.look(view(), never, R8))


def test_an_answer_that_was_not_wanted_is_not_under_way(me):
    who = page.visitor(me)
    assert is_skipped(who.look(view(lambda spec: (to(R32)(me),)), never, R64))
    page.changing("lora", lambda: (R64, "rank 64"))(me)
    assert is_skipped(who.look(view(), never, R64))


def test_an_answer_that_is_never_acknowledged_is_under_way_for_a_while_only(me, monkeypatch):
    who = page.visitor(me)
    to(R32)(me)
    who.look(view(), never, R32)
    now = page.time.monotonic()
    monkeypatch.setattr(page.time, "monotonic", lambda: now + page.UNDER_WAY)
    page.changing("lora", lambda: (R64, "rank 64"))(me)
    assert is_skipped(who.look(view(), never, R64))
