"""`peftlab memory`: predicted memory."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace

from .. import units
from ..base.models import find
from ..catalog.gpus import GPUS
from ..errors import SpecError
from ..memory import MemoryReport, exact, fits, predict, storage
from ..memory.seconds import fitted
from ..resolve import resolve
from ._shared import Commands, Output, count, spec_of, table, verb


def add(commands: Commands) -> None:
    parser = verb(commands, "memory", run, "predicted memory", spec=True)
    parser.add_argument("--convention", default="exact", help="exact, 8n, 12n, 16n-fp32, 16n-mixed or 18n")
    parser.add_argument("--exact", action="store_true", help="the peak of a whole step, traced: takes seconds")
    trained = "for a bare count such as 100B: how many are trained"
    parser.add_argument("--trainable-parameters", type=count, help=trained)
    parser.add_argument("--tasks", type=count, default=1, help="number of tasks to store")


def run(args: Namespace) -> Output:
    spec, convention, trained = resolve(spec_of(args)), args.convention, args.trainable_parameters
    if args.exact and convention != "exact":
        raise SpecError(f"convention={convention}: --exact counts what a run allocates; leave the convention out")
    if trained and find(spec.model).config:
        raise SpecError(
            f"trainable-parameters={trained}: {spec.model} has layers, so they are counted; "
            "leave it out, or give a bare count such as --model 100B"
        )
    report = exact(spec) if args.exact else predict(spec, convention, trained)
    if report.unknown:  # who asks here can wait for seconds; the states stand where there is no trace either
        with suppress(SpecError):
            report = replace(exact(spec), unknown=report.unknown)
    return report.to_dict() | {"storage": asdict(storage(report, args.tasks))}, _lines(report)


def _lines(report: MemoryReport) -> Iterator[str]:
    states = {"weights": report.weights, "gradients": report.gradients, "optimizer": report.optimizer}
    what = f"{report.method_name} on {report.model_name}"
    yield from filter(None, [find(report.spec.model).note])
    yield from table([(name, units.size(n)) for name, n in (states | {"sum": report.states}).items()])
    if report.peak:
        parts = {kind.replace("_", " "): units.size(n) for kind, n in report.peak.bytes.items() if n}
        yield from table([(f"at the peak: {kind}", size) for kind, size in parts.items()])
        how = "a trace of it on fake tensors" if report.source == "trace" else "the closed form; --exact traces it"
        how += f" ({report.unknown})" if report.unknown else ""
        allocated, whole = units.size(report.allocated), units.size(report.process)
        spec = report.spec
        step = f"{spec.batch_size} × {spec.sequence_length} tokens in {spec.precision}"
        yield f"{what}, peak of a step of {step}: {allocated} allocated, {whole} in all, by {how}"
    else:
        why = f": {report.unknown}" if report.unknown else ""
        yield f"{what}, {report.convention}; activations are not included{why}"
    if report.step_seconds is not None:
        took, known = report.step_seconds, fitted()
        run = f"{report.spec.steps} steps take {units.seconds(took * report.spec.steps)}"
        error = f"recorded ones on an {known.hardware[0]} are {known.mean:.0%} off on average"
        yield f"a step takes {1000 * took:.0f} ms on {GPUS[report.spec.gpu].name}, {run}; {error}"
    found = fits(report.needed)
    for fit in (f for f in found if f.gpu.key == report.spec.gpu):
        short = f"does not hold these {units.size(round(report.needed))}"
        holds = f"holds it, {units.percent(fit.share)} full" if fit.n_gpus == 1 else short
        yield f"{fit.gpu.name}, {units.size(fit.gpu.memory_bytes)}: {holds}"
    one = next((f.gpu for f in found if f.n_gpus == 1), None)
    smallest = f"{one.name}, {units.size(one.memory_bytes)}" if one else ""
    held = "it" if report.peak else "these alone"
    yield f"smallest GPU that holds {held}: {smallest}" if one else f"no single GPU of the catalogue holds {held}"
