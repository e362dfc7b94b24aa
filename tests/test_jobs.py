import threading

import pytest
from tiny import wait_for

from peftlab import RunSpec, SpecError, WeightsError
from peftlab.base import fetching
from peftlab.room import jobs
from peftlab.run import STOP


@pytest.fixture(autouse=True)
def own_jobs(monkeypatch, tmp_path):
    monkeypatch.setattr(jobs, "_jobs", {})
    monkeypatch.setattr(jobs, "RUNS", tmp_path)


class Trainer:
    """A run that waits to be let on; it ends like the engine when it finds a stop file."""

    def __init__(self) -> None:
        self.go, self.order = threading.Event(), []

    def __call__(self, spec, folder):
        self.order.append(spec.seed)
        yield {"type": "start", "seed": spec.seed}
        assert self.go.wait(20)
        yield {"type": "done", "stopped": (folder / STOP).exists()}


@pytest.fixture
def trainer():
    made = Trainer()
    yield made
    made.go.set()


def ends(job):
    """All events of a job that is over."""
    wait_for(lambda: job.over)
    return job.events


def test_a_second_run_of_the_same_owner_is_refused_while_one_is_on(trainer):
    job = jobs.start(RunSpec(seed=1), "ann", trainer)
    wait_for(lambda: job.events[-1]["type"] == "start")  # events are seen as they happen
    assert not job.over and jobs.running("ann") is job
    with pytest.raises(SpecError, match="already under way: wait for it, or stop it"):
        jobs.start(RunSpec(seed=2), "ann", trainer)
    with pytest.raises(SpecError, match="method=nonsense"):
        jobs.start(RunSpec(method="nonsense"), "bob", trainer)
    assert jobs.running("bob") is None
    trainer.go.set()
    assert [e["type"] for e in ends(job)] == ["queued", "start", "done"]
    assert jobs.running("ann") is None and jobs.find(job.id) is job and jobs.find(None) is None
    assert ends(jobs.start(RunSpec(seed=3), "ann", trainer))[-1]["type"] == "done"
    assert trainer.order == [1, 3]


def test_a_queued_run_that_is_stopped_is_over_at_once_and_never_begins(trainer):
    first, second = jobs.start(RunSpec(seed=1), "ann", trainer), jobs.start(RunSpec(seed=2), "bob", trainer)
    assert [job.events[0] for job in (first, second)] == [{"type": "queued", "ahead": n} for n in (0, 1)]
    assert (jobs.ahead(first), jobs.ahead(second)) == (0, 1)
    second.stop()
    assert ends(second)[-1]["message"] == "Stopped while it waited: nothing was learned." and not first.over
    trainer.go.set()
    third = jobs.start(RunSpec(seed=3), "bob", trainer)
    assert ends(third)[-1] == ends(first)[-1] == {"type": "done", "stopped": False}
    assert trainer.order == [1, 3] and jobs.ahead(third) == 0


def test_a_stop_is_forgotten_once_a_run_is_over_even_one_that_was_refused(trainer):
    def refuses(spec, folder):
        yield {"type": "loading"}
        assert trainer.go.wait(20)
        raise SpecError("rank=0: no")

    job = jobs.start(RunSpec(), "ann", refuses)
    wait_for(lambda: job.events[-1]["type"] == "loading")
    job.stop()
    assert job.stopping
    trainer.go.set()
    ends(job)
    job.stop()  # too late
    assert not job.stopping and not job.folder.exists()


@pytest.mark.parametrize(
    "error, said",
    [
        (SpecError("rank=0: no"), "rank=0: no"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("CUDA out of memory. Tried\nto"), "out of memory (CUDA out of memory. Tried): lower batch-size"),
        (None, "the run ended without a word"),
    ],
)
def test_an_error_becomes_the_last_event(error, said):
    def trainer(spec, folder):
        yield {"type": "start"}
        if error:
            raise error

    last = ends(jobs.start(RunSpec(), "ann", trainer))[-1]
    assert last["type"] == "error" and last["message"].startswith(said)
    assert jobs.running("ann") is None


@pytest.mark.parametrize("read", [lambda: jobs.running("ann"), jobs.finished], ids=["running", "finished"])
def test_a_run_that_starts_while_the_table_is_read_does_no_harm(read, trainer, monkeypatch):
    started = []

    def starts_another(job):
        """What the reader asks of each job; a run starts in another thread meanwhile."""
        if not started:
            started.append(threading.Thread(target=jobs.start, args=(RunSpec(), "bob", trainer)))
            started[0].start()
            started[0].join(0.3)
        return True

    trainer.go.set()
    ends(jobs.start(RunSpec(), "ann", trainer))
    monkeypatch.setattr(jobs.Job, "over", property(starts_another, lambda job, over: None), raising=False)
    read()
    started[0].join(20)
    assert len(jobs._jobs) == 2


def test_a_preparation_that_failed_can_begin_again(tiny_model, monkeypatch):
    def fails(model):
        raise WeightsError("no network; do this")
        yield

    preparation = jobs.Preparation(str(tiny_model))
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "fetch", fails)
        preparation.begin()
        preparation._thread.join(30)
    assert preparation.error == "no network; do this" and not preparation.ready
    preparation.begin()
    preparation._thread.join(30)
    assert preparation.ready and preparation.error is None


def test_a_preparation_that_is_stopped_leaves_no_download(tiny_model, monkeypatch):
    closed = threading.Event()

    def downloads(model):
        try:
            while True:
                yield fetching.Progress("downloading", "somewhere")
        finally:
            closed.set()

    monkeypatch.setattr(fetching, "fetch", downloads)
    preparation = jobs.Preparation(str(tiny_model))
    preparation.begin()
    preparation.stop()
    assert closed.is_set() and not preparation.ready and preparation.error is None
