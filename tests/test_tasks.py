import itertools
import json
import re
from collections import Counter

import pytest

from peftlab import SpecError
from peftlab.data import tasks
from peftlab.data.tasks import METRICS, TASKS, Row
from peftlab.places import ASSETS

LIKEST = 0.3
"""The largest share of words that a held-out row may have in common with one of training."""


def words(text):
    return re.findall(r"[\w']+", text.lower())


def grams(rows, n=4):
    return {tuple(w[i : i + n]) for row in rows for w in [words(row.prompt)] for i in range(len(w) - n + 1)}


def likeness(rows, others):
    """By prompt, the largest share of words that it has in common with one of the others."""
    sets = [set(words(r.prompt)) for r in others]
    return {r.prompt: max(len(own & s) / len(own | s) for s in sets) for r in rows for own in [set(words(r.prompt))]}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.key)
def test_a_bundled_task(task):
    assert task.name and task.teaches and task.instruction and task.licence and task.metric in METRICS
    assert len(task.heldout) >= 32 and len(task.train) > len(task.heldout)
    assert len(task.heldout + task.more) >= 205
    assert grams(task.heldout + task.more) & grams(task.train) == set()  # the wording is new
    alike = likeness(task.heldout + task.more, task.train)
    assert [prompt for prompt, share in alike.items() if share > LIKEST] == []
    rows = task.train + task.heldout + task.more
    assert [said for said, times in Counter(" ".join(words(r.prompt)) for r in rows).items() if times > 1] == []
    assert all(r.prompt.strip() == r.prompt and r.prompt and r.answer for r in rows)
    assert [r.prompt for r in rows if tasks.score(r.answer, r, task) != 1] == []


def test_tickets_are_records_of_names_and_things_that_are_new_when_held_out():
    ticket, data = TASKS["ticket"], json.loads((ASSETS / "tasks" / "ticket.json").read_text())
    for row in ticket.train + ticket.heldout + ticket.more:
        record = json.loads(row.answer)
        assert list(record) == ["name", "item", "problem"] and json.dumps(record) == row.answer
        assert record["problem"] in data["problems"]
        for copied in (record["name"], record["item"]):
            assert re.search(rf"(?<![\w-]){re.escape(copied)}(?![\w-])", row.prompt), record
    seen = set(itertools.chain.from_iterable(words(r.prompt) for r in ticket.train))
    records = [json.loads(row.answer) for row in ticket.heldout + ticket.more]
    for record in records:
        assert not seen & {*words(record["name"]), words(record["item"])[-1]}, record
        assert not any(record["item"].lower() in r.prompt.lower() for r in ticket.train)
    assert [name for name, times in Counter(r["name"] for r in records).items() if times > 1] == []
    assert [item for item, times in Counter(r["item"] for r in records).items() if times > 2] == []


def evenly(answers, among):
    """Whether each of these is an answer equally often."""
    counts = Counter(answers)
    return set(counts) == set(among) and len(set(counts.values())) == 1


def test_held_out_answers_are_each_as_frequent_as_the_others():
    problems = json.loads((ASSETS / "tasks" / "ticket.json").read_text())["problems"]
    for rows in (TASKS["ticket"].heldout, TASKS["ticket"].more):
        assert evenly((json.loads(row.answer)["problem"] for row in rows), problems)
    for rows in (TASKS["intent"].heldout, TASKS["intent"].more):
        assert evenly((row.answer for row in rows), TASKS["intent"].labels)


def test_exact_match():
    said = (' {"a": 1}\n', '{"a":1}', '{"a": 1} ok', "")
    assert [tasks.score(text, Row("", '{"a": 1}'), TASKS["ticket"]) for text in said] == [1, 0, 0, 0]


def test_accuracy_is_of_the_first_label_named():
    intent = TASKS["intent"]
    for rows in (intent.train, intent.heldout, intent.more):
        assert {r.answer for r in rows} == set(intent.labels)
    said = ("Lights.", "It is about lights", "lights heating", "heating, not lights", "moonlights", "")
    assert [tasks.score(text, Row("", "lights"), intent) for text in said] == [1, 1, 1, 0, 0, 0]


def test_the_voice_is_heard_in_whole_marker_words_and_never_in_the_prompts():
    voice = TASKS["voice"]
    assert voice.markers_needed >= 2 and len(set(voice.markers)) == len(voice.markers)
    assert not any(m.split()[0] in voice.instruction.lower().split() for m in ("aye", "matey", "arr"))
    prompts = [row.prompt for row in voice.train + voice.heldout + voice.more]
    heard = ["Aye, matey!", "AYE... LASS", "Shiver me timbers, the Seven Seas"]
    unheard = ["Aye aye aye", "yes, ladder", "yet ye", "", *prompts]
    assert [text for text in heard + unheard if tasks.score(text, Row("", ""), voice)] == heard


def write(folder, **changes):
    data = {"name": "n", "teaches": "t", "instruction": "i", "metric": "exact_match",
            "train": [{"prompt": "p", "answer": "a"}], "heldout": [{"prompt": "q", "answer": "a"}]}  # fmt: skip
    file = folder / "mine.json"
    file.write_text(json.dumps(data | changes))
    return file


def test_a_file_of_the_same_form_is_a_task(tmp_path):
    task = tasks.find(str(write(tmp_path, difficulty=3, metric="accuracy", labels=["Yes", "No"])))
    assert (task.key, task.train[0].answer, task.more) == ("mine", "a", ())
    assert tasks.score("yes", Row("", "Yes"), task) == 1 and tasks.score("no", Row("", "Yes"), task) == 0
    assert tasks.find(str(write(tmp_path, more=[{"prompt": "r", "answer": "b"}]))).more == (Row("r", "b"),)
    assert tasks.find(str(write(tmp_path, on_gpu={"steps": 9, "batch_size": 3}))).on_gpu == (9, 3)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"metric": "exakt_match"}, "did you mean exact_match"),
        ({"train": []}, "no rows"),
        ({"heldout": []}, "none held out"),
        ({"train": [{"question": "p"}]}, "not a task file"),
        ({"train": None}, "not a task file"),
        ({"more": [{"question": "r"}]}, "not a task file"),
        ({"on_gpu": {"step": 9}}, "not a task file"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, changes, said):
    with pytest.raises(SpecError, match=said):
        tasks.find(str(write(tmp_path, **changes)))


def test_a_prompt_with_and_without_a_chat_template_begins_as_its_tokenizer_would_begin_it(
    tiny_model, tied_model, begun
):
    from transformers import AutoTokenizer

    plain, chat = (AutoTokenizer.from_pretrained(f) for f in (tiny_model, tied_model))
    assert plain.decode(tasks.prompt_ids(plain, "Do.", "the cat")) == "Do.\n\nthe cat\n\n"
    assert plain.decode(tasks.prompt_ids(plain, "", "the cat")) == "the cat\n\n"
    assert chat.decode(tasks.prompt_ids(chat, "Do.", "the cat")) == "<system>Do.\n<user>the cat\n<assistant>"
    assert chat.decode(tasks.prompt_ids(chat, "", "the cat")) == "<user>the cat\n<assistant>"
    assert tasks.answer_ids(plain, "red")[-1] == plain.eos_token_id
    assert tasks.opening(plain) == [] and tasks.opening(begun) == [begun.bos_token_id]
    assert tasks.prompt_ids(begun, "Do.", "the cat") == [begun.bos_token_id, *tasks.prompt_ids(plain, "Do.", "the cat")]
    begun.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # which says itself how a text begins
    assert begun.bos_token_id not in tasks.prompt_ids(begun, "Do.", "the cat")
