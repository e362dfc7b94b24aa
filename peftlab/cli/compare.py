"""`peftlab compare`: the base and adapters, side by side."""

from argparse import Namespace
from pathlib import Path

from .. import adapters
from ..data import tasks
from ..errors import SpecError
from ..units import score
from ._shared import Commands, Output, count, finish, table, verb


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

    from ..compare import on_prompt, on_task
    from ..run.generate import Decoding

    chosen = [adapters.read(folder) for folder in args.adapter]
    task = args.task or chosen[0].spec.task
    if args.prompt is not None:
        decoding = Decoding(args.max_new_tokens, args.temperature, seed=args.seed)
        report = on_prompt(chosen, args.prompt, decoding, args.merged)
    elif task:
        report = finish(on_task(chosen, tasks.find(task), args.merged), "answering")
    else:
        raise SpecError(f"{args.adapter[0]} does not say what it was trained on; give --task or --prompt")
    lines = list(report.notes)
    for exchange in report.exchanges[:5]:
        lines += [f"\n> {exchange.prompt}", *(f"{reply.model:>10}: {reply.text.strip()}" for reply in exchange.replies)]
        if exchange.reference:
            lines.append(f"{'reference':>10}: {exchange.reference}")
    if report.scores:
        rows = [(s.model, score(s.mean), f"{score(s.low)} to {score(s.high)}", s.items) for s in report.scores]
        lines += ["", *table([("model", report.metric, "95% interval", "items"), *rows])]
    return report.to_dict(), lines
