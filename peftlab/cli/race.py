"""`peftlab race`: several runs of one task side by side."""

import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import fmean

from .. import units
from ..errors import SpecError
from ._shared import Commands, Output, check_writable, count, note, spec_of, table, verb


def add(commands: Commands) -> None:
    parser = verb(commands, "race", run, "several runs side by side, each one's progress on stderr", spec=True)
    vary = "a setting and the values to race; repeatable (default: method, all that suit the model)"
    parser.add_argument("--vary", nargs="+", action="append", metavar=("SETTING", "VALUE"), help=vary)
    parser.add_argument("--seconds", type=float, help="of training for each, instead of --steps")
    parser.add_argument("--seeds", type=count, default=1, help="runs of each")
    parser.add_argument("--no-latency", dest="latency", action="store_false", help="do not time the tokens of each")
    parser.add_argument("--sort", default="score", help="the column to rank by")
    parser.add_argument("--csv", type=Path, help="where to write the board as CSV")
    parser.add_argument("--out", type=Path, help="the JSON file to write; a race begun there goes on")


def run(args: Namespace) -> Output:
    """--out has what is finished after each racer, so that an interruption loses little."""
    from .. import race
    from ..run import warm_up

    race.column(args.sort)  # refused before anything runs
    axes = {setting: values for setting, *values in args.vary or [["method"]]}
    racers = race.along(spec_of(args), axes)
    known = race.read(args.out) if args.out and args.out.exists() and args.out.stat().st_size else []
    if others := [line.name for line in known if line.spec not in [racer.spec.to_dict() for racer in racers]]:
        raise SpecError(f"out={args.out}: it has {others[0]}, which is not in this race; give another path")
    check_writable(args.out, args.csv)
    lines: list[race.Line] = []
    warm_up(racers[0].spec)
    with tempfile.TemporaryDirectory() as folder:
        for event in race.race(racers, Path(folder), args.seeds, args.seconds, args.latency, known):
            if event["type"] == "line":
                lines[event["racer"]] = line = race.Line(**event["line"])
                note(f"{line.name}: {line.error or f'{len(line.scores)} of {args.seeds} seeds'}")
            elif event["type"] in ("racers", "done"):
                lines = [race.Line(**line) for line in event["lines"]]
            if args.out and event["type"] in ("line", "done"):
                race.record(args.out, axes, lines)
    lines = race.ranked(lines, args.sort)
    if args.csv:
        args.csv.write_text(race.to_csv(lines), encoding="utf-8")
    rows = [("", "score", "95% interval", "loss", "trained", "training", "")]
    for line in lines:
        trained = f"{line.trainable_parameters:,}"
        if not line.scores:
            rows.append((line.name, "", "", "", trained, "", line.error or "stopped"))
            continue
        low, high = map(units.score, line.interval)
        loss, seconds = units.significant(fmean(line.loss)), units.seconds(fmean(line.training_seconds))
        rows.append((line.name, units.score(line.score), f"{low} to {high}", loss, trained, seconds, ""))
    return race.document(axes, lines), table(rows)
