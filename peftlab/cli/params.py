"""`peftlab params`: exact parameter counts."""

from argparse import Namespace

from .. import units
from ..base.models import find
from ..count import count
from ..resolve import resolve
from ._shared import Commands, Output, spec_of, table, verb


def add(commands: Commands) -> None:
    verb(commands, "params", run, "exact parameter counts", spec=True)


def run(args: Namespace) -> Output:
    report = count(resolve(spec_of(args)))
    trained = [m for m in report.modules if m.trainable]
    rows = [(m.module.name, "×".join(map(str, m.shape)), m.adapted_layers, f"{m.trainable:,}") for m in trained]
    last = (
        f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters are trained "
        f"({units.percent(report.trainable_percent / 100)}); the adapter is {units.size(report.adapter_bytes)}"
    )
    note = find(report.spec.model).note
    lines = [
        *table([("module", "shape", "layers", "trainable"), *rows]),
        *report.frozen,
        *([note] if note else []),
        last,
    ]
    return report.to_dict() | ({"note": note} if note else {}), lines
