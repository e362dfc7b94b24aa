"""`peftlab bench`: measurements on this machine, written as JSON."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ..spec import Json
from ._shared import Commands, Output, check_writable, count, note, note_event, spec_of, verb


def add(commands: Commands) -> None:
    parser = verb(commands, "bench", run, "measure on this machine and write JSON", spec=True)
    what = (
        "train",
        "gears",
        "generate",
        "record",
        "memory",
        "calculators",
        "page",
        "families",
        "seconds",
        "serve",
        "reliability",
        "room",
        "fresh",
        "start",
    )
    parser.add_argument("what", choices=what)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--at-once", type=count, default=1, help="memory: processes that share the GPU")
    parser.add_argument("--seeds", type=count, default=1, help="train: runs of each trainer; reliability: runs")
    parser.add_argument("--beside", action="store_true", help="reliability: Trainer too, for the seconds")
    parser.add_argument("--peer", action="append", help="train: one of the trainers; repeatable (default: all)")
    random = "train: of the model's shapes, and rows of --sequence-length tokens"
    parser.add_argument("--family", action="append", help="families: one of them; repeatable (default: all)")
    parser.add_argument("--jobs", type=count, default=1, help="families: how many at once")
    parser.add_argument("--again", action="store_true", help="families: those too that the file has already")
    parser.add_argument(
        "--visitors",
        type=count,
        action="append",
        help="serve: how many; repeatable (default: 50 and 200). room: how many train (default: 50)",
    )
    parser.add_argument("--seconds", type=count, default=24, help="serve: how long each clicks")
    parser.add_argument(
        "--arriving", choices=("at once", "spread"), action="append", help="serve: how; repeatable (default: both)"
    )
    parser.add_argument("--rounds", type=count, default=2, help="serve and start: turns of each app")
    parser.add_argument("--only", action="append", help="room: visitors, kills or memory; repeatable (default: all)")
    parser.add_argument("--kills", type=count, default=20, help="room: how often the server is killed")
    parser.add_argument("--runs", type=count, default=100, help="room: runs over which memory is measured")
    parser.add_argument("--random-weights", action="store_true", help=random)
    parser.add_argument("--adapter-out", type=Path, help="record: where to keep the adapter")


def run(args: Namespace) -> Output:
    from ..bench import calculators, fresh, memory, record, reliability, room, seconds, serve, speed, start, survey

    out = args.out
    check_writable(out)  # before it measures for minutes
    recorders: dict[str, Callable[[], Json]] = {
        "train": lambda: speed.record_speed(spec_of(args), out, note, args.seeds, args.peer, args.random_weights),
        "gears": lambda: record.record_gears(spec_of(args), out, note),
        "generate": lambda: record.record_generation(spec_of(args), out, note),
        "record": lambda: record.record_train(spec_of(args), out, note_event, args.adapter_out),
        "memory": lambda: memory.record_memory(out, note, args.at_once),
        "calculators": lambda: calculators.record_calculators(out),
        "families": lambda: survey.record_families(out, note, args.family, args.jobs, args.again),
        "page": lambda: record.record_page(out, note),
        "reliability": lambda: reliability.record_reliability(spec_of(args), out, note, args.seeds, args.beside),
        "fresh": lambda: fresh.record_fresh(spec_of(args), out, note),
        "room": lambda: room.record_room(out, note, args.only, (args.visitors or [50])[0], args.kills, args.runs),
        "serve": lambda: serve.record_serve(
            out, note, args.visitors or (), args.seconds, args.rounds, args.arriving or ()
        ),
        "start": lambda: start.record_start(out, note, args.rounds),
        "seconds": lambda: seconds.record_seconds(out, note),
    }
    document = recorders[args.what]()
    return document, map(calculators.markdown, document.get("comparisons", ()))
