"""What the lectures claim of methods and settings, put to the test: a question to answer first, a recorded race, and for
each claim what came out and whether it holds here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from .. import units
from ..methods import METHODS
from ..race import Line, recordings
from ..race.recordings import Board, Recording
from .guide import Finding

NEAR = 0.05
"""Scores no farther apart than this count as the same: two of forty held-out rows."""
SAME = 0.03
"""As near to full fine-tuning as 'the same' means: the claim is of one or two points."""
SLOWER = 1.05
"""Time a token over the base's from which it counts as slower."""


@dataclass(frozen=True)
class Claim:
    says: str
    source: str
    """The lecture."""
    test: Callable[[Board], Finding]


@dataclass(frozen=True)
class Lesson:
    key: str
    name: str
    setting: str
    """What its racers differ in."""
    question: str
    options: tuple[str, ...]
    answer: Callable[[Board], int]
    """Which of the options came out."""
    claims: tuple[Claim, ...]
    values: tuple[str, ...]
    """Of a small race to run live."""

    def recordings(self) -> list[Recording]:
        """The recorded races, the fullest first."""
        return recordings.of(self.key)

    def findings(self, lines: Sequence[Line]) -> list[tuple[Claim, Finding | None]]:
        """Each claim and what the lines say to it; None where they say nothing."""
        board = Board(lines)
        found: list[tuple[Claim, Finding | None]] = []
        for claim in self.claims:
            try:
                found.append((claim, claim.test(board)))
            except (LookupError, ValueError):  # a racer has not finished, or none has of which to take the best
                found.append((claim, None))
        return found


def _pair(one: Line, other: Line) -> str:
    return f"{one.name} {units.score(one.score)}, {other.name} {units.score(other.score)}"


def _near_full(b: Board) -> Finding:
    lora, full = b.of(method="lora"), b.of(method="full")
    return Finding(_pair(lora, full), full.score - lora.score <= SAME)


def _full_wins(b: Board) -> Finding:
    full, rest = b.of(method="full"), [line for line in b.lines if line.spec["method"] != "full"]
    rival = max(rest, key=lambda line: line.score)
    return Finding(_pair(full, rival), full.score >= rival.score)


def _last_layers(b: Board) -> Finding:
    head, block, lora = (b.of(method=key) for key in ("head", "last-block", "lora"))
    return Finding(f"{_pair(head, block)}, {lora.name} {units.score(lora.score)}", block.score < lora.score - NEAR)


def _prompts(b: Board) -> Finding:
    prompts = [b.of(method=key) for key in ("prompt", "p-tuning", "prefix")]
    lora = b.of(method="lora")
    figure = ", ".join(f"{line.name} {units.score(line.score)}" for line in (*prompts, lora))
    return Finding(figure, max(line.score for line in prompts) < lora.score - NEAR)


def _forgets(b: Board) -> Finding:
    lora, full = b.of(method="lora"), b.of(method="full")
    low, high = fmean(lora.forgetting), fmean(full.forgetting)
    return Finding(
        f"ordinary text costs {low:.2f} nats a token more after LoRA, {high:.2f} after full fine-tuning", low < high
    )


def _faster(b: Board) -> Finding:
    lora, full = b.of(method="lora"), b.of(method="full")
    a, f = fmean(lora.training_seconds), fmean(full.training_seconds)
    rest = [line for line in b.lines if line.spec["method"] != "full"]
    quicker = sum(fmean(line.training_seconds) < f for line in rest)
    figure = f"{lora.steps} steps: LoRA {units.seconds(a)}, full {units.seconds(f)} (in {full.spec['precision']})"
    return Finding(f"{figure}; {quicker} of {len(rest)} methods are faster", a < f)


def _memory(b: Board) -> Finding:
    peaks = [
        (line.measured_peak_bytes or line.predicted_peak_bytes) for line in (b.of(method="lora"), b.of(method="full"))
    ]
    how = "measured" if b.of(method="lora").measured_peak_bytes else "predicted"
    return Finding(f"{how} peak: LoRA {units.size(peaks[0])}, full {units.size(peaks[1])}", peaks[0] < peaks[1])


def _latency(b: Board) -> Finding:
    houlsby, lora = b.of(method="houlsby"), b.of(method="lora")
    if houlsby.apart is None or lora.merged is None or lora.apart is None:
        raise LookupError("not timed")
    figure = (
        f"a token takes {houlsby.apart:.2f}× the base's with Houlsby; with LoRA {lora.merged:.2f}× once merged "
        f"({lora.apart:.2f}× before)"
    )
    return Finding(figure, houlsby.apart > SLOWER >= lora.merged)


def _parallel(b: Board) -> Finding:
    parallel, serial = b.of(method="parallel").apart, b.of(method="pfeiffer").apart
    if parallel is None or serial is None:
        raise LookupError("not timed")
    figure = f"{parallel:.2f}× the base's time a token, against {serial:.2f}× in series at the same place"
    return Finding(figure, parallel * SLOWER < serial)


def _houlsby(b: Board) -> Finding:
    adapters = [b.of(method=key) for key in ("houlsby", "pfeiffer", "parallel", "post-attention", "io-adapter")]
    best = max(adapters, key=lambda line: line.score)
    return Finding(_pair(adapters[0], best), adapters[0].score >= best.score - SAME)


def _ends_only(b: Board) -> Finding:
    adapters = [b.of(method=key) for key in ("io-adapter", "houlsby", "pfeiffer", "parallel", "post-attention")]
    figure = ", ".join(f"{line.name} {units.score(line.score)}" for line in adapters)
    return Finding(figure, adapters[0].score <= min(line.score for line in adapters))


def _four_bits(b: Board) -> Finding:
    qlora, lora = b.of(method="qlora"), b.of(method="lora")
    peak = units.size(qlora.measured_peak_bytes or qlora.predicted_peak_bytes)
    return Finding(f"{_pair(qlora, lora)}; peak {peak}", lora.score - qlora.score <= SAME)


RANKS = (4, 8, 32, 64)
"""Those that lecture 11.2 finds alike."""


def _rank_flat(b: Board) -> Finding:
    scores = {rank: b.score(rank=rank) for rank in RANKS}
    figure = ", ".join(f"rank {rank} {units.score(s)}" for rank, s in scores.items())
    return Finding(f"{figure}, each at its best rate", max(scores.values()) - min(scores.values()) <= NEAR)


def _one_rate(b: Board) -> Finding:
    """Of the rates that every rank was raced at, that with the least spread."""
    spreads = {}
    for rate in sorted({line.spec["learning_rate"] for line in b.lines}):
        scores = [b.score(rank=rank, learning_rate=rate) for rank in RANKS]
        spreads[rate] = (
            max(scores) - min(scores),
            f"{rate:g} {units.score(min(scores))} to {units.score(max(scores))}",
        )
    least, _ = min(spreads.values())
    figure = "; ".join(text for _, text in spreads.values())
    return Finding(f"ranks {', '.join(map(str, RANKS))} at {figure}", least > NEAR)


def _rank_one(b: Board) -> Finding:
    one, two, eight = (b.score(rank=rank) for rank in (1, 2, 8))
    figure = f"rank 1 {units.score(one)}, rank 2 {units.score(two)}, rank 8 {units.score(eight)}"
    return Finding(figure, min(one, two) >= eight - NEAR)


def _rank_answer(b: Board) -> int:
    change = b.score(rank=64) - b.score(rank=1)
    return 0 if change > NEAR else 2 if change < -NEAR else 1


ALL, QV, ATTENTION = "all-linear", "query,value", "query,key,value,attention output"


def _all_layers(b: Board) -> Finding:
    scores = {name: b.score(target_modules=key) for name, key in (("all", ALL), ("attention", ATTENTION), ("q, v", QV))}
    figure = ", ".join(f"{name} {units.score(s)}" for name, s in scores.items())
    return Finding(figure, scores["all"] > max(scores["attention"], scores["q, v"]) + SAME)


def _modules_answer(b: Board) -> int:
    change = b.score(target_modules=ALL) - b.score(target_modules=QV)
    return 1 if change > NEAR else 0 if change < -NEAR else 2


FEW = (8, 16, 32)


def _few_rows(b: Board) -> Finding:
    means = {m: fmean(b.score(method=m, training_rows=n) for n in FEW) for m in ("lora", "full")}
    figure = f"mean over {', '.join(map(str, FEW))} rows: LoRA {units.score(means['lora'])}, full {units.score(means['full'])}"
    return Finding(figure, means["lora"] > means["full"] + SAME)


def _rows_answer(b: Board) -> int:
    change = b.score(method="lora", training_rows=FEW[0]) - b.score(method="full", training_rows=FEW[0])
    return 0 if change > NEAR else 1 if change < -NEAR else 2


SMALL, LARGE = "smollm2-135m-instruct", "gemma-3-270m"
PROMPTS = ("prompt", "prefix")


def _of_size(b: Board, model: str, keys: Sequence[str]) -> list[Line]:
    return [b.of(model=model, method=key) for key in keys]


def _gemma_best(b: Board) -> Finding:
    lines = _of_size(b, LARGE, ("lora", "houlsby", *PROMPTS))
    best = max(lines, key=lambda line: line.score)
    return Finding(_each(lines), lines[0].score >= best.score - SAME)


def _gemma_prompts(b: Board) -> Finding:
    lora, *prompts = _of_size(b, LARGE, ("lora", *PROMPTS))
    return Finding(_each([*prompts, lora]), max(line.score for line in prompts) < lora.score - NEAR)


def _size_full(b: Board) -> Finding:
    lora, full = _of_size(b, LARGE, ("lora", "full"))
    return Finding(_each([lora, full]), full.score - lora.score <= SAME)


def _each(lines: Sequence[Line]) -> str:
    """Of one model, each method's score."""
    return ", ".join(f"{METHODS[line.spec['method']].name} {units.score(line.score)}" for line in lines)


def _size_answer(b: Board) -> int:
    change = b.score(model=LARGE, method="lora") - b.score(model=SMALL, method="lora")
    return 1 if change > NEAR else 0 if change < -NEAR else 2


LECTURE_RATE = 2e-4


def _lecture_rate(b: Board) -> Finding:
    lora = [line for line in b.lines if line.spec["method"] == "lora"]
    near = min(lora, key=lambda line: abs(line.spec["learning_rate"] - LECTURE_RATE))
    best = max(lora, key=lambda line: line.score)
    each = " and ".join(f"{units.score(line.score)} at {line.spec['learning_rate']:g}" for line in (near, best))
    return Finding(f"LoRA after {near.steps} steps: {each}", near.score >= best.score - NEAR)


def _rates_differ(b: Board) -> Finding:
    lora, full = b.best("learning_rate", "lora"), b.best("learning_rate", "full")
    return Finding(f"best for LoRA {lora:g}, for full fine-tuning {full:g}: {lora / full:.0f}×", lora >= 5 * full)


def _prompt_rates(b: Board) -> Finding:
    lora = b.best("learning_rate", "lora")
    prompts = {key: b.best("learning_rate", key) for key in ("prompt", "p-tuning", "prefix")}
    figure = ", ".join(f"{b.of(method=key).name.partition(',')[0]} {rate:g}" for key, rate in prompts.items())
    return Finding(f"{figure}; LoRA {lora:g}", min(prompts.values()) > lora)


def _rate_answer(b: Board) -> int:
    ratio = b.best("learning_rate", "lora") / b.best("learning_rate", "full")
    return 0 if ratio < 5 else 1 if ratio <= 10 else 2


def _best_answer(b: Board) -> int:
    groups = (("full",), ("lora",), ("houlsby", "pfeiffer", "parallel"), ("prompt", "prefix", "p-tuning"))
    scores = [max(b.score(method=key) for key in group) for group in groups]
    return scores.index(max(scores))


LESSONS: dict[str, Lesson] = {
    lesson.key: lesson
    for lesson in (
        Lesson(
            "methods",
            "All methods",
            "method",
            "Same data, same steps, each at a learning rate tuned for it. Which scores highest on tickets it has never seen?",
            ("full fine-tuning", "LoRA", "adapters between layers", "learned prompts"),
            _best_answer,
            (
                Claim("LoRA comes near full fine-tuning", "kiit-tutorial, LoRA", _near_full),
                Claim(
                    "On a small model, full fine-tuning may do better",
                    "beginners-guide, When not to use PEFT",
                    _full_wins,
                ),
                Claim("Tuning only the last layer is sub-optimal", "beginners-guide", _last_layers),
                Claim("Prompts score substantially lower on small models", "lecture-11-2, Design trade-offs", _prompts),
                Claim("PEFT forgets less", "kiit-tutorial, PEFT to the rescue", _forgets),
                Claim("PEFT trains faster", "beginners-guide, Pros and cons", _faster),
                Claim("PEFT needs less memory", "beginners-guide, Pros and cons", _memory),
                Claim("Adapters slow inference; merged LoRA does not", "lecture-11-2, Adapters vs LoRA", _latency),
                Claim("A parallel adapter keeps the critical path short", "vanderbilt-slides, adapters", _parallel),
                Claim("Houlsby has the best quality of the adapters", "vanderbilt-slides, adapters", _houlsby),
                Claim("Adapters at input and output only: lowest quality", "vanderbilt-slides, adapters", _ends_only),
                Claim("QLoRA maintains performance", "beginners-guide, Examples", _four_bits),
            ),
            ("lora", "ia3", "houlsby", "prompt"),
        ),
        Lesson(
            "rank",
            "Rank",
            "rank",
            "Alpha twice the rank, each rank at its best of three learning rates. From rank 1 to 64, what does the score do?",
            ("it rises", "it stays the same", "it falls"),
            _rank_answer,
            (
                Claim(
                    "Performance is insensitive to rank: 4, 8, 32 and 64 are alike", "lecture-11-2, Rank r", _rank_flat
                ),
                Claim("Rank 1 or 2 already performs well", "lecture-11-2, Rank r", _rank_one),
                Claim("Each rank wants a learning rate of its own", "peftlab's method cards, LoRA", _one_rate),
            ),
            ("1", "8", "64"),
        ),
        Lesson(
            "modules",
            "Target modules",
            "target_modules",
            "LoRA of the same rank, on query and value only or on every linear map. Which scores higher?",
            ("query and value", "every linear map", "no difference"),
            _modules_answer,
            (Claim("Training all layers beats attention alone", "lecture-11-2, Where to apply LoRA", _all_layers),),
            (QV, ALL),
        ),
        Lesson(
            "rows",
            "Training rows",
            "training_rows",
            f"Only {FEW[0]} tickets to learn from, read again and again. Which does better on new ones?",
            ("LoRA", "full fine-tuning", "no difference"),
            _rows_answer,
            (Claim("PEFT shines when data is short", "beginners-guide, Limited data", _few_rows),),
            ("8", "32", "384"),
        ),
        Lesson(
            "size",
            "Model size",
            "model",
            "LoRA on SmolLM2 135M (tuned to instructions) or on Gemma 3 270M (only pre-trained): which scores higher?",
            ("SmolLM2 135M", "Gemma 3 270M", "no difference"),
            _size_answer,
            (
                Claim("For Gemma 3 270M LoRA is the best choice", "lecture-11-2, Design trade-offs", _gemma_best),
                Claim("For Gemma 3 270M avoid prompts: too small", "lecture-11-2, Design trade-offs", _gemma_prompts),
                Claim("LoRA comes near full fine-tuning, on Gemma 3 270M too", "kiit-tutorial, LoRA", _size_full),
            ),
            (SMALL, LARGE),
        ),
        Lesson(
            "rate",
            "Learning rate",
            "learning_rate",
            "Each method was tried at six learning rates or more. How does LoRA's best compare with full fine-tuning's?",
            ("about the same", "5 to 10 times higher", "more than 10 times higher"),
            _rate_answer,
            (
                Claim("2e-4 for models of 270M to 7B", "lecture-11-2, Training hyperparameters", _lecture_rate),
                Claim("LoRA wants a higher rate than full fine-tuning", "peftlab's method cards, LoRA", _rates_differ),
                Claim(
                    "Prompt-based methods want a higher rate still",
                    "peftlab's method cards, prompt tuning",
                    _prompt_rates,
                ),
            ),
            ("3e-4", "3e-3", "3e-2"),
        ),
    )
}


def find(key: str) -> Lesson:
    """Raises SpecError where there is none."""
    from ..errors import SpecError
    from ..spec import closest

    if key not in LESSONS:
        raise SpecError(f"lesson={key}: no such lesson; {closest(key, LESSONS)}")
    return LESSONS[key]
