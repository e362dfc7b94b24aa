"""Other memory calculators on the rows of `bench memory`, each held against the quantity that it says it predicts.

A calculator covers a row where its inputs can describe the run, or where the run is what its formula assumes. peftlab does
not depend on them: one that cannot be imported is left out. `pip install fitcheck-llm==0.3.1 accelerate deepspeed`
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

from .. import methods
from ..base import architecture, configs, models
from ..count import count
from ..measured import documents, provenance
from ..memory import predict
from ..memory.states import workspace
from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec
from . import write

Row = Json
"""One of `rows` in a document of `bench memory`: its spec, measured and predicted bytes."""
GROUPS = ("full", "LoRA-like", "QLoRA and int8", "other methods", "all")
"""Groups of methods by which errors are summed up."""


class NotCovered(Exception):
    """Says why a calculator has no answer for a row."""


@dataclass(frozen=True)
class Calculator:
    name: str
    module: str
    """What must be importable before it is asked."""
    package: str | None
    """The distribution whose version is reported; None for peftlab, which is run from its tree."""
    quantities: tuple[str, ...]
    """What it says it predicts, as `measured` knows it."""
    ask: Callable[[Row], Mapping[str, int]]
    """Predicted bytes of each of them. Raises NotCovered."""


def _spec(row: Row) -> Resolved:
    return resolve(RunSpec.from_dict(row["spec"]))


def measured(row: Row, quantity: str) -> int | None:
    """Measured bytes; None where the row did not measure them.

    Model states are weights and optimizer states, which are left after a step beside cuBLAS's workspace, and gradients, which
    are gone by then and as large as what is trained.
    """
    if quantity == "model states":
        spec = _spec(row)
        return row["measured"]["after_bytes"] - 2 * workspace(spec.gpu) + predict(spec).gradients
    return row["measured"][f"{quantity.replace(' ', '_')}_bytes"]


def _peftlab(row: Row) -> dict[str, int]:
    return {name: row["predicted"][f"{name.replace(' ', '_')}_bytes"] for name in ("peak allocated", "peak reserved")}


def _require(covered: bool, why_not: str) -> None:
    if not covered:
        raise NotCovered(why_not)


def _fitcheck(row: Row) -> dict[str, int]:
    """The three tiers by which it grades itself: without its overhead, without its CUDA context, and the whole
    (github.com/Anassbzdd/fitcheck, docs/SPEC.md 3.8). Where it refuses a run, its own words are kept."""
    from fitcheck import TrainingConfig, estimate, estimator, get_gpu, gpu_db, overhead_db

    spec = _spec(row)
    shape, full = architecture.of(spec.model), spec.method == "full"
    as_lora = ("lora", "qlora", "rslora", "lora-plus", "pissa")  # whose tensors have LoRA's shapes and types
    _require(full or spec.method in as_lora, f"method={spec.method}: it knows full fine-tuning and LoRA")
    _require(full or spec.precision != "amp", "precision=amp: it has no bf16 activations over a frozen fp32 base")
    _require(full or spec.adapter_precision == "fp32", "adapter-precision=bf16: its adapters are fp32")
    states_in_16_bits = full and spec.precision in ("bf16", "fp16") and spec.optimizer_precision != "fp32"
    settings = TrainingConfig(
        precision="bf16" if spec.precision == "amp" else spec.precision,
        quantization=spec.quantization,
        double_quant=spec.double_quantization,
        optimizer=spec.optimizer,
        optimizer_dtype="bf16" if states_in_16_bits else "fp32",
        batch_size=spec.batch_size,
        seq_len=spec.sequence_length,
        lora_rank=None if full else spec.rank,
        lora_targets=[m.short_name for m in shape.targets(spec.target_modules or "all-linear")],
        grad_checkpoint=spec.gradient_checkpointing,
        flash_attn=spec.attention == "sdpa",  # what it measured under this flag
    )
    try:
        gpu, config = get_gpu(spec.gpu.removesuffix("gb")), _fitcheck_config(spec.model)
        counted, trained = estimator.trainable_params(config, settings), count(spec).trainable_parameters
        report = estimate(config, settings, gpu)
    except ValueError as refusal:
        raise NotCovered(f"it refuses: {refusal}") from None
    _require(abs(counted / trained - 1) < 0.02, f"it counts {counted:,} trained parameters of {trained:,}")
    profile = overhead_db.get_overhead_profile(gpu_db.gpu_key_for(gpu), settings.flash_attn, settings.quantization)
    outside = {"peak allocated": report.overhead_mib, "peak reserved": profile.base_context_mib, "process": 0}
    return {name: round((report.total_mib - mib) * 2**20) for name, mib in outside.items()}


def _fitcheck_config(model: str) -> object:
    """Its own description of a model. It asks the Hub for the config and the exact count; here the catalogue answers."""
    from fitcheck import config_parser

    entry = models.find(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(entry.config))
        known = entry.total_parameters
        with patch.multiple(config_parser, hf_hub_download=lambda **_: file, _reported_param_count=lambda *_: known):
            return config_parser.fetch_model_config(entry.hub_id or model)


def _full_adam(row: Row, *precisions: str) -> Resolved:
    """The row's spec, if it is a full fine-tune by Adam in one of these precisions. Raises NotCovered."""
    spec = _spec(row)
    _require(spec.method == "full", f"method={spec.method}: it knows full fine-tuning alone")
    _require(spec.optimizer == "adamw", f"optimizer={spec.optimizer}: it knows Adam alone")
    _require(spec.precision in precisions, f"precision={spec.precision}: it knows {', '.join(precisions)} alone")
    return spec


def _accelerate(row: Row) -> dict[str, int]:
    """`Training using Adam` of `accelerate estimate-memory`. Its Space calls that the peak; what it adds up are the model,
    gradients and Adam's states (huggingface.co/spaces/hf-accelerate/model-memory-usage), so it is held against both."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "amp": "bfloat16"}
    spec = _full_adam(row, *names)
    total, _ = calculate_maximum_sizes(configs.build_meta(models.find(spec.model).config or {}).float())
    usage = max(estimate_training_usage(total, names[spec.precision]).values())
    return {"peak allocated": usage, "model states": usage}


def _zero2(row: Row) -> dict[str, int]:
    """20 bytes a parameter on one GPU without offloading: deepspeed.readthedocs.io/en/latest/memory.html. Its engine keeps
    16-bit weights beside fp32 ones, which of our precisions only amp resembles."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    total = count(_full_adam(row, "amp")).total_parameters
    return {"model states": estimate_zero2_model_states_mem_needs(total, cpu_offload=False)[1]}


def _zero3(row: Row) -> dict[str, int]:
    """18 bytes a parameter, and 4 bytes a parameter of the largest layer to gather it: the same page."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    spec = _full_adam(row, "amp")
    largest = max(module.weight + module.bias for module in architecture.of(spec.model).modules)
    total = count(spec).total_parameters
    needs = estimate_zero3_model_states_mem_needs(total, largest, cpu_offload=False, cpu_offload_params=False)
    return {"model states": needs[1]}


CALCULATORS = (
    Calculator("peftlab", "peftlab", None, ("peak allocated", "peak reserved"), _peftlab),
    Calculator("fitcheck", "fitcheck", "fitcheck-llm", ("peak allocated", "peak reserved", "process"), _fitcheck),
    Calculator("accelerate", "accelerate", "accelerate", ("peak allocated", "model states"), _accelerate),
    Calculator("DeepSpeed ZeRO-2", "deepspeed", "deepspeed", ("model states",), _zero2),
    Calculator("DeepSpeed ZeRO-3", "deepspeed", "deepspeed", ("model states",), _zero3),
)


def record_calculators(out: Path) -> Json:
    """Compares on the rows recorded under assets/measured/, and writes the errors, without every answer, to `out`."""
    found = [compare(document) for document in documents("memory")]
    kept = [{name: one[name] for name in ("source", "table", "left_out")} for one in found]
    return write(provenance() | {"kind": "calculators", "comparisons": kept}, out)


def compare(document: Json, calculators: Sequence[Calculator] = CALCULATORS) -> Json:
    """Errors by calculator, quantity and group of methods (`table`), and every answer (`rows`), ready for json.dump.

    An error is predicted / measured − 1; `covered` rows of a group's `rows` have one.
    """
    rows = [row for row in document["rows"] if "error" not in row]
    found: list[Json] = [{"spec": row["spec"], "group": _group(_spec(row)), "answers": {}} for row in rows]
    table, left_out = [], {}
    for tool in calculators:
        try:
            import_module(tool.module)
        except ImportError as error:
            left_out[tool.name] = str(error)
            continue
        for row, kept in zip(rows, found, strict=True):
            kept["answers"][tool.name] = _answer(tool, row)
        about = {"tool": tool.name, "version": version(tool.package) if tool.package else "this tree"}
        for quantity in tool.quantities:
            for group in GROUPS:
                answers = [kept["answers"][tool.name] for kept in found if group in (kept["group"], "all")]
                errors = [answer.get(quantity, {}).get("error") for answer in answers]
                table.append(about | {"quantity": quantity, "group": group} | summarize(errors))
    source = {name: document.get(name) for name in ("command", "hardware", "versions", "date")}
    return {"source": source, "table": table, "left_out": left_out, "rows": found}


def _answer(tool: Calculator, row: Row) -> Json:
    try:
        predicted = tool.ask(row)
    except NotCovered as why:
        return {"why_not": str(why)}
    answer = {}
    for name in tool.quantities:
        real = measured(row, name)
        error = predicted[name] / real - 1 if real else None
        answer[name] = {"predicted_bytes": predicted[name], "measured_bytes": real, "error": error}
    return answer


def _group(spec: Resolved) -> str:
    if spec.quantization != "none":
        return "QLoRA and int8"
    if spec.method == "full":
        return "full"
    return "LoRA-like" if "rank" in methods.find(spec.method).settings else "other methods"


def summarize(errors: Sequence[float | None]) -> Json:
    """How many errors there are, how many are known, and of these the mean absolute, the worst with its sign, and the mean."""
    known = [error for error in errors if error is not None]
    return {
        "rows": len(errors),
        "covered": len(known),
        "mean_absolute_error": fmean(map(abs, known)) if known else None,
        "worst_error": max(known, key=abs, default=None),
        "bias": fmean(known) if known else None,
    }


def markdown(comparison: Json) -> str:
    """The table of `compare` in Markdown, without the lines that cover no row."""
    lines = ["| calculator | version | held against | methods | rows | mean absolute error | worst | bias |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for line in comparison["table"]:
        if line["covered"]:
            about = " | ".join(line[name] for name in ("tool", "version", "quantity", "group"))
            errors = f"{line['mean_absolute_error']:.1%} | {line['worst_error']:+.1%} | {line['bias']:+.1%}"
            lines.append(f"| {about} | {line['covered']} of {line['rows']} | {errors} |")
    return "\n".join(lines + [f"\n{name} is left out: {why}." for name, why in comparison["left_out"].items()]) + "\n"
