import itertools
import json
import re

import pytest

from peftlab import SpecError
from peftlab.data import tasks
from peftlab.data.tasks import METRICS, TASKS, Row
from peftlab.places import ASSETS

BUNDLED = pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.key)


def words(text):
    return re.findall(r"[\w']+", text.lower())


def grams(rows, n=4):
    return {tuple(w[i : i + n]) for row in rows for w in [words(row.prompt)] for i in range(len(w) - n + 1)}


@BUNDLED
def test_there_are_enough_held_out_rows_and_none_is_trained_on(task):
    assert len(task.heldout) >= 32 and len(task.train) > len(task.heldout)
    assert not {r.prompt for r in task.heldout} & {r.prompt for r in task.train}
    for rows in (task.train, task.heldout):
        assert len({r.prompt for r in rows}) == len(rows)


@BUNDLED
def test_held_out_wording_is_new(task):
    assert grams(task.heldout) & grams(task.train) == set()


@BUNDLED
def test_a_task_says_what_it_is(task):
    assert task.name and task.teaches and task.instruction and task.licence and task.metric in METRICS
    assert all(r.prompt.strip() == r.prompt and r.prompt and r.answer for r in task.train + task.heldout)


@BUNDLED
def test_every_reference_scores_1(task):
    assert [r.prompt for r in task.train + task.heldout if tasks.score(r.answer, r, task) != 1] == []


def test_tickets_are_records_with_the_keys_in_order():
    ticket, data = TASKS["ticket"], json.loads((ASSETS / "tasks" / "ticket.json").read_text())
    for row in ticket.train + ticket.heldout:
        record = json.loads(row.answer)
        assert list(record) == ["name", "item", "problem"]
        assert record["problem"] in data["problems"]
        assert json.dumps(record) == row.answer
        assert record["name"] in row.prompt and record["item"] in row.prompt


def test_ticket_names_and_things_are_new_when_held_out():
    ticket = TASKS["ticket"]
    seen = set(itertools.chain.from_iterable(words(r.prompt) for r in ticket.train))
    for row in ticket.heldout:
        record = json.loads(row.answer)
        for word in words(record["name"]):
            assert word not in seen, record
        assert words(record["item"])[-1] not in seen, record
        assert not any(record["item"].lower() in r.prompt.lower() for r in ticket.train)


def test_intents_are_labels_and_all_of_them_are_held_out():
    intent = TASKS["intent"]
    for rows in (intent.train, intent.heldout):
        assert {r.answer for r in rows} == set(intent.labels)


def test_voice_markers_are_never_in_the_prompts():
    voice = TASKS["voice"]
    assert voice.markers_needed >= 2 and len(set(voice.markers)) == len(voice.markers)
    assert not any(m.split()[0] in voice.instruction.lower().split() for m in ("aye", "matey", "arr"))
    for row in voice.train + voice.heldout:
        assert tasks.score(row.prompt, row, voice) == 0


def test_exact_match():
    task, row = TASKS["ticket"], Row("", '{"a": 1}')
    assert tasks.score(' {"a": 1}\n', row, task) == 1
    assert not any(tasks.score(text, row, task) for text in ('{"a":1}', '{"a": 1} ok', ""))


@pytest.mark.parametrize(
    "said, right",
    [
        ("lights", 1),
        ("Lights.", 1),
        ("It is about lights", 1),
        ("heating, not lights", 0),
        ("moonlights", 0),
        ("", 0),
        ("lights heating", 1),
    ],
)
def test_accuracy_is_the_first_label_named(said, right):
    assert tasks.score(said, Row("", "lights"), TASKS["intent"]) == right


@pytest.mark.parametrize(
    "said, right",
    [
        ("Aye, matey!", 1),
        ("AYE... LASS", 1),
        ("Aye aye aye", 0),
        ("yes, ladder", 0),
        ("Shiver me timbers, the Seven Seas", 1),
        ("yet ye", 0),
        ("", 0),
    ],
)
def test_the_voice_is_heard_in_whole_marker_words(said, right):
    assert tasks.score(said, Row("", ""), TASKS["voice"]) == right


def test_labels_may_have_capitals(tmp_path):
    task = tasks.read(write(tmp_path, metric="accuracy", labels=["Yes", "No"]))
    assert tasks.score("yes", Row("", "Yes"), task) == 1 and tasks.score("no", Row("", "Yes"), task) == 0


def write(folder, **changes):
    data = {"name": "n", "teaches": "t", "instruction": "i", "metric": "exact_match",
            "train": [{"prompt": "p", "answer": "a"}], "heldout": [{"prompt": "q", "answer": "a"}]}  # fmt: skip
    file = folder / "mine.json"
    file.write_text(json.dumps(data | changes))
    return file


def test_a_file_of_the_same_form_is_a_task(tmp_path):
    task = tasks.find(str(write(tmp_path, difficulty=3)))
    assert (task.key, task.train[0].answer) == ("mine", "a")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"metric": "exakt_match"}, "did you mean exact_match"),
        ({"train": []}, "no rows"),
        ({"heldout": []}, "none held out"),
        ({"train": [{"question": "p"}]}, "not a task file"),
        ({"train": None}, "not a task file"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, changes, said):
    with pytest.raises(SpecError, match=said):
        tasks.find(str(write(tmp_path, **changes)))


def test_prompts_with_and_without_a_chat_template(tiny_model, tied_model):
    from transformers import AutoTokenizer

    plain, chat = (AutoTokenizer.from_pretrained(f) for f in (tiny_model, tied_model))
    assert plain.decode(tasks.prompt_ids(plain, "Do.", "the cat")) == "Do.\n\nthe cat\n\n"
    assert plain.decode(tasks.prompt_ids(plain, "", "the cat")) == "the cat\n\n"
    assert chat.decode(tasks.prompt_ids(chat, "Do.", "the cat")) == "<system>Do.\n<user>the cat\n<assistant>"
    assert chat.decode(tasks.prompt_ids(chat, "", "the cat")) == "<user>the cat\n<assistant>"
    assert tasks.answer_ids(plain, "red")[-1] == plain.eos_token_id


def test_a_text_begins_as_its_tokenizer_would_begin_it(tiny_model, begun):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_model)
    without = tasks.prompt_ids(plain, "Do.", "the cat")
    assert tasks.opening(plain) == [] and tasks.opening(begun) == [begun.bos_token_id]
    assert tasks.prompt_ids(begun, "Do.", "the cat") == [begun.bos_token_id, *without]
    begun.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # which says itself how a text begins
    assert begun.bos_token_id not in tasks.prompt_ids(begun, "Do.", "the cat")
