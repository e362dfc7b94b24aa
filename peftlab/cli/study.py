"""`peftlab study`: what an adapter did to each matrix."""

from argparse import Namespace
from pathlib import Path

from .. import adapters, units
from ..base import weights
from ..errors import SpecError
from ..resolve import resolve
from ._shared import Commands, Output, count, finish, note, table, verb

HEAD = ("module", "shape", "rank", "rank for 90%", "‖ΔW‖/‖W‖", "amplification", "intruders")


def add(commands: Commands) -> None:
    parser = verb(commands, "study", run, "what an adapter did to each matrix, as JSON; progress on stderr")
    parser.add_argument("--adapter", type=Path, required=True, help="an adapter folder")
    targets = "roles or names, such as query,value or all-linear (default: what the adapter trained)"
    parser.add_argument("--targets", help=targets)
    keep = "top directions of each update to keep, to compare adapters by (default: none)"
    parser.add_argument("--keep", type=count, default=0, help=keep)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")


def run(args: Namespace) -> Output:
    from ..compare import study

    adapter = adapters.read(args.adapter)
    names = study.names(adapter, args.targets)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"out={args.out}: cannot be written ({error.strerror}); give a JSON file") from None
    if args.out.is_dir():
        raise SpecError(f"out={args.out}: that is a folder; give a JSON file, such as {args.out / study.FILE}")
    base = weights.load(resolve(adapter.spec.but(precision="fp32", gpu=None, quantization="none")))
    found = finish(study.study(base, adapter, names, args.keep), "studying")
    if not found.matrices:
        where = f"none of {args.targets}" if args.targets else "no linear map that is studied by default"
        raise SpecError(f"adapter={args.adapter}: it changes {where}; name in --targets what it does change")
    args.out.write_text(found.to_json(), encoding="utf-8")
    note(f"study of {len(found.matrices)} matrices in {args.out}")
    rows: list[tuple[object, ...]] = [HEAD]
    for m in found.matrices:
        shape = "×".join(map(str, m.shape))
        relative = "" if m.relative_size is None else units.percent(m.relative_size)
        amplified = "" if m.amplification.factor is None else f"{units.significant(m.amplification.factor)}×"
        intruders = f"{len(m.intruders.directions)} of {len(m.intruders.cosines)}"
        rows.append((m.name, shape, m.delta.rank, m.delta.rank_for(0.9), relative, amplified, intruders))
    return found.to_dict(), table(rows)
