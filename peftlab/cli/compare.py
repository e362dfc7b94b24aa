"""`peftlab compare`: the base and adapters, side by side."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import adapters, units
from ..data import tasks
from ..errors import SpecError
from ._arguments import Commands, Output, count, verb
from ._output import finish, table

if TYPE_CHECKING:
    from ..compare import ComparisonReport


def add(commands: Commands) -> None:
    parser = verb(commands, "compare", run, "base and adapters, side by side")
    parser.add_argument("--adapter", type=Path, action="append", required=True, help="an adapter folder; repeatable")
    parser.add_argument("--prompt", help="one prompt of your own")
    parser.add_argument("--task", help="a task's held-out rows (default: the adapter's own task)")
    parser.add_argument("--merged", action="store_true", help="fold each adapter into the base's weights first")
    parser.add_argument("--max-new-tokens", type=count, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)


def run(args: Namespace) -> Output:
    if args.prompt is not None and args.task:
        raise SpecError("--prompt and --task: give one of them")
    report = _compared(args)
    return report.to_dict(), _lines(report)


def _compared(args: Namespace) -> ComparisonReport:
    from ..compare import on_prompt, on_task
    from ..run.generate import Decoding

    chosen = [adapters.read(folder) for folder in args.adapter]
    if args.prompt is not None:
        decoding = Decoding(args.max_new_tokens, args.temperature, seed=args.seed)
        return on_prompt(chosen, args.prompt, decoding, args.merged)
    task = args.task or chosen[0].spec.task
    if not task:
        raise SpecError(f"{args.adapter[0]} does not say what it was trained on; give --task or --prompt")
    return finish(on_task(chosen, tasks.find(task), args.merged), "answering")


def _lines(report: ComparisonReport) -> Iterator[str]:
    for exchange in report.exchanges[:5]:
        yield f"\n> {exchange.prompt}"
        yield from (f"{reply.model:>10}: {reply.text.strip()}" for reply in exchange.replies)
        if exchange.reference:
            yield f"{'reference':>10}: {exchange.reference}"
    if report.scores:
        yield ""
        score = units.score
        rows = [(s.model, score(s.mean), f"{score(s.low)} to {score(s.high)}", s.items) for s in report.scores]
        yield from table([("model", report.metric, "95% interval", "items"), *rows])
