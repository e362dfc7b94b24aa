"""`peftlab …` or `python -m peftlab …`: everything the app does, without a browser.

Exit status: 0 done; 2 a wrong argument, one line on stderr; 1 it failed while running.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, seam, units
from .errors import PeftlabError, SpecError
from .show import sentences
from .spec import SETTINGS, RunSpec


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def console() -> NoReturn:
    """The command, in a process of its own: every line it prints is its own."""
    seam.quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "‖" shows "?"
    try:
        status = main()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:
            print(f"peftlab: the output cannot be written ({error.strerror})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        status = 1
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except SpecError as error:
        print(f"peftlab: {error}", file=sys.stderr)
        return 2
    except PeftlabError as error:
        print(f"peftlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("peftlab: interrupted", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    installed = Path(sys.argv[0]).stem == "peftlab"  # the console command, by which people then know it
    parser = _Parser(
        prog="peftlab" if installed else "python -m peftlab",
        description="Everything the app does, without a browser.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"peftlab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, run: Any, about: str, spec: bool = False, prints: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        if prints:
            sub.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        if spec:
            _add_spec(sub)
        return sub

    for name, run in CATALOGUES.items():
        command(name, run, f"the catalogue of {name}")
    page = command("app", _app, "the page, in a process of its own, until Ctrl-C", prints=False)
    page.add_argument("--host", help="the address to answer at (default: 127.0.0.1, this machine alone)")
    page.add_argument("--port", type=_port, help="its port (default: the first free one from 7860)")
    command("fetch", _fetch, "get a base model ready, ahead of a talk").add_argument("model")
    command("params", _params, "exact parameter counts", spec=True)
    memory = command("memory", _memory, "predicted memory", spec=True)
    memory.add_argument("--convention", default="exact", help="exact, 8n, 12n, 16n-fp32, 16n-mixed or 18n")
    memory.add_argument("--exact", action="store_true", help="the peak of a whole step, traced: takes seconds")
    memory.add_argument(
        "--trainable-parameters", type=_count, help="for a bare count such as 100B: how many are trained"
    )
    memory.add_argument("--tasks", type=_count, default=1, help="number of tasks to store")
    train = command("train", _train, "fine-tune; progress on stderr", spec=True)
    train.add_argument("--out", type=Path, help="folder for the adapter (default: a new one under runs/)")
    race = command("race", _race, "several runs side by side, each one's progress on stderr", spec=True)
    race.add_argument(
        "--vary",
        nargs="+",
        action="append",
        metavar=("SETTING", "VALUE"),
        help="a setting and the values to race; repeatable (default: method, all that suit the model)",
    )
    race.add_argument("--seconds", type=float, help="of training for each, instead of --steps")
    race.add_argument("--seeds", type=_count, default=1, help="runs of each")
    race.add_argument("--no-latency", dest="latency", action="store_false", help="do not time the tokens of each")
    race.add_argument("--sort", default="score", help="the column to rank by")
    race.add_argument("--csv", type=Path, help="where to write the board as CSV")
    race.add_argument("--out", type=Path, help="the JSON file to write; a race begun there goes on")
    compare = command("compare", _compare, "base and adapters, side by side")
    compare.add_argument("--adapter", type=Path, action="append", required=True, help="an adapter folder; repeatable")
    compare.add_argument("--prompt", help="one prompt of your own")
    compare.add_argument("--task", help="a task's held-out rows (default: the adapter's own task)")
    compare.add_argument("--merged", action="store_true", help="fold each adapter into the base's weights first")
    compare.add_argument("--max-new-tokens", type=_count, default=64)
    compare.add_argument("--temperature", type=float, default=0.0)
    compare.add_argument("--seed", type=int, default=0)
    study = command("study", _study, "what an adapter did to each matrix, as JSON; progress on stderr")
    study.add_argument("--adapter", type=Path, required=True, help="an adapter folder")
    study.add_argument(
        "--targets", help="roles or names, such as query,value or all-linear (default: what the adapter trained)"
    )
    study.add_argument(
        "--keep",
        type=_count,
        default=0,
        help="top directions of each update to keep, to compare adapters by (default: none)",
    )
    study.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    bench = command("bench", _bench, "measure on this machine and write JSON", spec=True)
    bench.add_argument("what", choices=("train", "gears", "generate", "record", "memory", "calculators", "page"))
    bench.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    bench.add_argument("--at-once", type=_count, default=1, help="memory: processes that share the GPU")
    bench.add_argument("--seeds", type=_count, default=1, help="train: runs of each trainer")
    bench.add_argument("--peer", action="append", help="train: one of the trainers; repeatable (default: all)")
    bench.add_argument(
        "--random-weights",
        action="store_true",
        help="train: of the model's shapes, and rows of --sequence-length tokens",
    )
    bench.add_argument("--adapter-out", type=Path, help="record: where to keep the adapter")
    return parser


def _add_spec(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--spec", type=Path, help="a JSON file with any of these settings; flags win")
    sub.add_argument("--preset", help="published settings by name (see presets); flags win")
    group = sub.add_argument_group("settings")
    for name, about in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        limits = f"; one of {', '.join(about.choices)}" if about.choices else ""
        text = f"{about.meaning}{limits} (automatic: {about.automatic})".replace("%", "%%")
        if about.type is bool:
            group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, dest=name, metavar=about.type.__name__.upper(), help=text)


def _count(text: str) -> int:
    """A whole number, also as 500M."""
    from .base.models import UNITS

    scale = UNITS.get(text[-1:].upper(), 1)
    try:
        value = round(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1, such as 40 or 500M")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 to 65535, such as 7860")
    return int(text)


def _spec(args: argparse.Namespace) -> RunSpec:
    values: dict[str, Any] = {}
    if args.spec:
        try:
            values = RunSpec.from_json(args.spec.read_text(encoding="utf-8")).to_dict()
        except SpecError as error:
            raise SpecError(f"spec={args.spec}: {error}") from None
        except OSError as error:
            raise SpecError(f"spec={args.spec}: cannot be read ({error.strerror}); give a JSON file") from None
        except UnicodeDecodeError:
            raise SpecError(f"spec={args.spec}: cannot be read (it is not text); give a JSON file") from None
    flags = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    for name, value in flags.items():
        if value == "":
            raise SpecError(f"{name.replace('_', '-')} is empty; leave it out for automatic")
    spec = RunSpec.from_dict(values | flags)
    if args.preset:
        from .catalog import presets
        from .resolve import with_preset

        spec = RunSpec.from_dict(with_preset(spec, presets.find(args.preset)).to_dict() | flags)
    return spec


def _print(document: Any) -> None:
    print(json.dumps(document))


def _table(rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _models(args: argparse.Namespace) -> None:
    from .base.models import MODELS

    if args.json:
        _print([{"key": m.key, "name": m.name, "hub_id": m.hub_id, "total_parameters": m.total_parameters,
                 "licence": m.licence, "trainable": m.is_causal} for m in MODELS.values()])  # fmt: skip
    else:
        _table([(m.key, f"{m.total_parameters:,}", m.name, m.hub_id or m.source) for m in MODELS.values()])


def _methods(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from .catalog.papers import PAPERS
    from .methods import METHODS

    if args.json:
        _print([{"key": m.key, **asdict(m.about), "papers": [PAPERS[p].url for p in m.about.papers],
                 "settings": m.settings, "merges": m.merge is not None} for m in METHODS.values()])  # fmt: skip
    else:
        _table([(m.key, m.about.family, m.name, m.about.hypothesis) for m in METHODS.values()])


def _gpus(args: argparse.Namespace) -> None:
    from .catalog.gpus import GPUS

    if args.json:
        _print([g.__dict__ for g in GPUS.values()])
    else:
        _table([(g.key, f"{g.memory_gb:g} GB", g.name, g.source) for g in GPUS.values()])


def _tasks(args: argparse.Namespace) -> None:
    from .data.tasks import TASKS

    if args.json:
        _print([{"key": t.key, "name": t.name, "teaches": t.teaches, "metric": t.metric, "train": len(t.train),
                 "heldout": len(t.heldout)} for t in TASKS.values()])  # fmt: skip
    else:
        _table([(t.key, f"{len(t.train)} + {len(t.heldout)} held out", t.metric, t.teaches) for t in TASKS.values()])


def _presets(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from .catalog.presets import PRESETS

    if args.json:
        _print([asdict(p) for p in PRESETS.values()])
    else:
        _table([(p.key, p.name, p.says, p.source) for p in PRESETS.values()])


CATALOGUES = {"models": _models, "methods": _methods, "gpus": _gpus, "tasks": _tasks, "presets": _presets}


def _app(args: argparse.Namespace) -> int:
    """app.py in a process of its own. Returns its exit status, as a shell tells it."""
    import signal
    import socket
    import subprocess
    from importlib.util import find_spec

    from .places import ROOT

    if missing := [name for name in ("gradio", "plotly") if find_spec(name) is None]:
        raise SpecError(f"app: the page needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    environment = dict(os.environ)
    try:
        socket.create_server((args.host or "127.0.0.1", args.port or 0)).close()
    except socket.gaierror:
        raise SpecError(
            f"host={args.host}: no such address on this machine; give another one, such as 0.0.0.0"
        ) from None
    except OSError as error:
        named = f"port={args.port}" if args.port else f"host={args.host}"
        raise SpecError(f"{named}: cannot be used ({error.strerror}); give another one") from None
    if args.host:
        environment["GRADIO_SERVER_NAME"] = args.host
    if args.port:
        environment["GRADIO_SERVER_PORT"] = str(args.port)
    # in a session of its own, so that a terminal's Ctrl-C reaches it once, by way of this process
    page = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=environment, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: page.send_signal(signal.SIGINT if got == signal.SIGHUP else got))
    status = page.wait()
    return status if status >= 0 else 128 - status


def _fetch(args: argparse.Namespace) -> None:
    from .base import models, weights

    entry, last = models.find(args.model), None
    if weights.source_of(entry) is None and entry.licence:
        print(f"{entry.name} is under: {entry.licence}", file=sys.stderr)
    for p in weights.fetch(args.model):
        last = p
        bar = f" {units.size(p.done)} of {units.size(p.total)}" if p.total else ""
        end = "\r" if sys.stderr.isatty() else "\n"
        if sys.stderr.isatty() or p.stage != "downloading":
            print(f"{p.stage}: {p.detail}{bar}", end=end, file=sys.stderr, flush=True)
    assert last is not None
    folder = weights.folder_of(entry)
    if args.json:
        _print({"model": args.model, "folder": str(folder), "source": last.detail, "bytes": last.total})
    else:
        print(f"{args.model} is ready in {folder}, from {last.detail}")


def _params(args: argparse.Namespace) -> None:
    from .count import count
    from .resolve import resolve

    report = count(resolve(_spec(args)))
    if args.json:
        _print(report.to_dict())
        return
    _table(
        [("module", "shape", "layers", "trainable")]
        + [
            (m.name, "×".join(map(str, m.shape)), m.adapted_layers, f"{m.trainable:,}")
            for m in report.modules
            if m.trainable
        ]
    )
    print(
        f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters are trained "
        f"({units.percent(report.trainable_percent / 100)}); the adapter is {units.size(report.adapter_bytes)}"
    )


def _memory(args: argparse.Namespace) -> None:
    from .base.models import find
    from .memory import exact, fits, predict, storage
    from .resolve import resolve

    spec = resolve(_spec(args))
    if args.exact and args.convention != "exact":
        raise SpecError(f"convention={args.convention}: --exact counts what a run allocates; leave the convention out")
    if args.trainable_parameters and find(spec.model).config:
        raise SpecError(
            f"trainable-parameters={args.trainable_parameters}: {spec.model} has layers, so they are counted; "
            "leave it out, or give a bare count such as --model 100B"
        )
    report = exact(spec) if args.exact else predict(spec, args.convention, args.trainable_parameters)
    disk = storage(report, args.tasks)
    if args.json:
        _print(
            report.to_dict()
            | {"storage": {"tasks": disk.tasks, "full": disk.full, "adapters": disk.adapters, "base": disk.base}}
        )
        return
    _table(
        [
            ("weights", units.size(report.weights)),
            ("gradients", units.size(report.gradients)),
            ("optimizer", units.size(report.optimizer)),
            ("sum", units.size(report.states)),
        ]
    )
    if report.peak:
        _table(
            [(f"at the peak: {kind.replace('_', ' ')}", units.size(n)) for kind, n in report.peak.bytes.items() if n]
        )
        how = "a trace of it on fake tensors" if report.source == "trace" else "the closed form; --exact traces it"
        print(
            f"peak of a step: {units.size(report.allocated)} allocated, {units.size(report.process)} in all, by {how}"
        )
    else:
        print(f"{report.method_name} on {report.model_name}, {report.convention}; activations are not included")
    one = next((f.gpu.name for f in fits(report.needed) if f.n_gpus == 1), None)
    print(f"smallest GPU that holds it: {one}" if one else "no single GPU of the catalogue holds it")


def _train(args: argparse.Namespace) -> int:
    from .resolve import resolve_here
    from .run import train

    spec = resolve_here(_spec(args))
    out = args.out or Path("runs") / f"{spec.task}-{spec.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    last: dict[str, Any] = {}
    for last in train(spec, out):
        if args.json:
            print(json.dumps(last), flush=True)
        _say(last)
    return 0 if last.get("type") == "done" else 1


def _race(args: argparse.Namespace) -> None:
    import tempfile

    from . import race
    from .run import warm_up

    race.column(args.sort)  # refused before anything runs
    axes = {setting: values for setting, *values in args.vary or [["method"]]}
    racers = race.along(_spec(args), axes)
    known = race.read(args.out) if args.out and args.out.exists() and args.out.stat().st_size else []
    if others := [line.name for line in known if line.spec not in [racer.spec.to_dict() for racer in racers]]:
        raise SpecError(f"out={args.out}: it has {others[0]}, which is not in this race; give another path")
    _writable(args.out, args.csv)
    warm_up(racers[0].spec)
    lines: list[race.Line] = []
    with tempfile.TemporaryDirectory() as folder:
        for event in race.race(racers, Path(folder), args.seeds, args.seconds, args.latency, known):
            if event["type"] in ("racers", "done"):
                lines = [race.Line(**line) for line in event["lines"]]
            if event["type"] != "line":
                continue
            lines[event["racer"]] = line = race.Line(**event["line"])
            text = line.error or f"{len(line.scores)} of {args.seeds} seeds"
            print(f"{line.name}: {text}", file=sys.stderr, flush=True)
            if args.out:  # after each, so that what a long race has learned outlives it
                race.record(args.out, axes, lines)
    if args.out:  # a race that was whole already is written as this command names it
        race.record(args.out, axes, lines)
    if args.csv:
        args.csv.write_text(race.to_csv(race.ranked(lines, args.sort)), encoding="utf-8")
    lines = race.ranked(lines, args.sort)
    if args.json:
        _print(race.document(axes, lines))
        return
    _table(
        [("", "score", "95% interval", "loss", "trained", "training", "")]
        + [
            (
                line.name,
                units.score(line.score),
                "{} to {}".format(*map(units.score, line.interval)),
                units.significant(sum(line.loss) / len(line.loss)),
                f"{line.trainable_parameters:,}",
                units.seconds(sum(line.training_seconds) / len(line.training_seconds)),
                "",
            )
            if line.scores
            else (line.name, "", "", "", f"{line.trainable_parameters:,}", "", line.error or "stopped")
            for line in lines
        ]
    )


def _writable(*files: Path | None) -> None:
    """Raises SpecError where one cannot be written; makes its folder."""
    for file in filter(None, files):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise SpecError(f"{file}: cannot be written ({error.strerror}); give another path") from None


def _say(event: dict[str, Any]) -> None:
    """Progress for people, on stderr."""
    kind = event["type"]
    if kind == "step":
        text = f"step {event['step']}/{event['steps']}  loss {event['loss']:.3f}  {units.seconds(event['eta_seconds'])} left"
    elif kind == "eval":
        metric, value = next(iter(event["metrics"].items()))
        text = f"held out, {event['when']}: {metric} {units.score(value)} of {event['items']}"
    elif kind == "start":
        text = (
            f"{event['model']} from {event['source']}; {event['trainable_parameters']:,} parameters are trained, "
            f"{sentences.gear([event])}"
        )
    elif kind == "loading":
        text = f"loading {event['model']}"
    elif kind == "done":
        text = event.get("message") or f"adapter in {event['adapter']}, {units.seconds(event['seconds'])} in all"
    else:
        return
    print(text, file=sys.stderr, flush=True)


def _compare(args: argparse.Namespace) -> None:
    from . import adapters
    from .compare import on_prompt, on_task
    from .data import tasks
    from .run.generate import Decoding

    if args.prompt is not None and args.task:
        raise SpecError("--prompt and --task: give one of them")
    chosen = [adapters.read(folder) for folder in args.adapter]
    if args.prompt is not None:
        report = on_prompt(
            chosen, args.prompt, Decoding(args.max_new_tokens, args.temperature, seed=args.seed), args.merged
        )
    else:
        key = args.task or chosen[0].spec.task
        if not key:
            raise SpecError(f"{args.adapter[0]} does not say what it was trained on; give --task or --prompt")
        work = on_task(chosen, tasks.find(key), args.merged)
        while True:
            try:
                share = next(work)
            except StopIteration as finished:
                report = finished.value
                break
            if sys.stderr.isatty():
                print(f"answering {100 * share:.0f}%", end="\r", file=sys.stderr)
    if args.json:
        _print(report.to_dict())
        return
    for exchange in report.exchanges[:5]:
        print(f"\n> {exchange.prompt}")
        for reply in exchange.replies:
            print(f"{reply.model:>10}: {reply.text.strip()}")
        if exchange.reference:
            print(f"{'reference':>10}: {exchange.reference}")
    if report.scores:
        print()
        _table(
            [("model", report.metric, "95% interval", "items")]
            + [
                (s.model, units.score(s.mean), f"{units.score(s.low)} to {units.score(s.high)}", s.items)
                for s in report.scores
            ]
        )


def _study(args: argparse.Namespace) -> None:
    from . import adapters
    from .base import weights
    from .compare import study
    from .resolve import resolve

    adapter = adapters.read(args.adapter)
    names = study.names(adapter, args.targets)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"out={args.out}: cannot be written ({error.strerror}); give a JSON file") from None
    if args.out.is_dir():
        raise SpecError(f"out={args.out}: that is a folder; give a JSON file, such as {args.out / study.FILE}")
    base = weights.load(resolve(adapter.spec.but(precision="fp32", gpu=None, quantization="none")))
    work = study.study(base, adapter, names, args.keep)
    while True:
        try:
            share = next(work)
        except StopIteration as finished:
            found = finished.value
            break
        if sys.stderr.isatty():
            print(f"studying {100 * share:.0f}%", end="\r", file=sys.stderr)
    if not found.matrices:
        where = f"none of {args.targets}" if args.targets else "no linear map that is studied by default"
        raise SpecError(f"adapter={args.adapter}: it changes {where}; name in --targets what it does change")
    args.out.write_text(found.to_json(), encoding="utf-8")
    if args.json:
        _print(found.to_dict())
    else:
        _table(
            [("module", "shape", "rank", "rank for 90%", "‖ΔW‖/‖W‖", "amplification", "intruders")]
            + [
                (
                    m.name,
                    "×".join(map(str, m.shape)),
                    m.delta.rank,
                    m.delta.rank_for(0.9),
                    "" if m.relative_size is None else units.percent(m.relative_size),
                    "" if m.amplification.factor is None else f"{units.significant(m.amplification.factor)}×",
                    f"{len(m.intruders.directions)} of {len(m.intruders.cosines)}",
                )
                for m in found.matrices
            ]
        )
    print(f"study of {len(found.matrices)} matrices in {args.out}", file=sys.stderr, flush=True)


def _bench(args: argparse.Namespace) -> None:
    from .bench import (
        record_calculators,
        record_gears,
        record_generation,
        record_memory,
        record_page,
        record_speed,
        record_train,
    )
    from .bench.calculators import markdown

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    _writable(args.out)  # before it measures for minutes
    if args.what == "memory":
        document = record_memory(args.out, args.at_once, say)
    elif args.what == "generate":
        document = record_generation(_spec(args), args.out, say)
    elif args.what == "gears":
        document = record_gears(_spec(args), args.out, say)
    elif args.what == "train":
        document = record_speed(_spec(args), args.out, args.seeds, args.peer, args.random_weights, say)
    elif args.what == "page":
        document = record_page(args.out, say)
    elif args.what == "calculators":
        document = record_calculators(args.out)
        for comparison in () if args.json else document["comparisons"]:
            print(markdown(comparison))
    else:
        document = record_train(_spec(args), args.out, args.adapter_out, _say)
    if args.json:
        _print(document)


if __name__ == "__main__":
    console()
