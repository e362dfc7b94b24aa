"""Four thousand specs, sound and unsound: a prediction that holds together, or an error of ours that says what is wrong."""

import json
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from io import StringIO

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftlab import RunSpec, SpecError, predict, resolve
from peftlab.base.models import MODELS
from peftlab.catalog.gpus import GPUS
from peftlab.cli import main
from peftlab.memory import CONVENTIONS
from peftlab.memory.report import KINDS
from peftlab.methods import METHODS
from peftlab.spec import SETTINGS

NUMBERS = st.one_of(
    st.integers(1, 64), st.sampled_from([128, 512, 2048, 8192, 65536, 10_000_000]), st.sampled_from([0, -1, 2**31, 10**30]),
    st.sampled_from([0.5, 1e-9, 1e300, float("nan"), float("inf")]),
)  # fmt: skip
WRONG = st.sampled_from(["", " ", "x", "nosuch", "8", "1e3", "True", [], {}, ("a",), b"", object, "é\0", "-", "../.."])
NAMES = {
    "model": [*MODELS, "7B", "100B", "1.5k", "0B", "999999T", "gpt-2", "/nowhere", "llama"],
    "method": [*METHODS, "LoRA", "lorra"],
    "gpu": [*GPUS, "h100"],
    "target_modules": ["all-linear", "query,value", "q_proj,v_proj", "c_attn", "down", "nothing", ",", "q_proj,,"],
    "layers": ["all", "first:4", "last:4", "0-3,7", "first:1000", "99", "3-1", "-", "last:0", "0-999999999"],
    "task": ["ticket", "voice", "intent", "tickets"],
}


def sound(name):
    """Values that the setting takes on its own."""
    about = SETTINGS[name]
    if about.choices or name in NAMES:
        return st.sampled_from(about.choices or [n for n in NAMES[name] if n not in ("0B", "999999T")])
    if about.type is bool:
        return st.booleans()
    low, high = about.low or about.above or 0, min(about.high or 64, 8192 if name == "sequence_length" else 64)
    return st.integers(max(1, int(low)), int(high)) if about.type is int else st.floats(max(low, 1e-6), min(high, 1.0))


@lru_cache
def value(name):
    """Sound nine times in ten."""
    usual = sound(name)
    anything = st.one_of(NUMBERS, st.sampled_from(NAMES[name]) if name in NAMES else WRONG, WRONG, st.none())
    return st.integers(0, 9).flatmap(lambda n: usual if n else anything)


SEVERAL = st.sampled_from(
    [{}, {}, {}, {"n_gpus": 8, "sharding": "fsdp"}, {"n_gpus": 4, "sharding": "zero2", "offload": "optimizer"}]
)
FEW = st.lists(st.sampled_from(sorted(set(SETTINGS) - {"model", "method"})), max_size=8, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: value(name) for name in ("model", "method", *names)})
)
RUNS = st.tuples(FEW, SEVERAL).map(lambda pair: pair[0] | pair[1])
FIXED = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def holds_together(report):
    assert report.states == report.weights + report.gradients + report.optimizer
    parts = ("frozen_weights", "trainable_weights", "gradients", "optimizer", "outside", "cpu")
    assert min(getattr(report, part) for part in parts) >= 0
    for moment in report.moments:
        assert set(moment.bytes) <= set(KINDS) and min(moment.bytes.values()) >= 0, moment
        assert moment.total == sum(moment.bytes.values()) <= report.allocated
    if report.moments:
        assert report.allocated == report.peak.total == sum(report.peak.bytes.values())
        assert report.allocated <= report.reserved < report.process == report.needed
    else:
        assert report.allocated is report.reserved is report.process is None and report.needed == report.states
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["states_bytes"] == report.states and data["peak_allocated_bytes"] == report.allocated


def grows(spec, report):
    """Twice the examples, the tokens or the rank never takes less."""
    for name in ("batch_size", "sequence_length", "rank"):
        old = getattr(report.spec, name)
        if old is None:
            continue
        try:
            more = predict(resolve(spec.but(**{name: 2 * old})))
        except SpecError:
            continue
        assert more.allocated >= report.allocated, (name, old)


@settings(max_examples=4000, **FIXED)
@given(
    values=RUNS, convention=st.sampled_from(["exact"] * 8 + [*CONVENTIONS, "13n"]), trainable=st.sampled_from([None, None, 1000])
)  # fmt: skip
def predicted_or_refused(found, values, convention, trainable):
    try:
        spec = RunSpec.from_dict(values)
        report = predict(resolve(spec), convention, trainable)
    except SpecError as error:
        assert str(error) and "\n" not in str(error)
        found["refused"] += 1
        return
    found.update(["a step" if report.moments else "states", report.spec.method])
    holds_together(report)
    if report.moments:
        grows(spec, report)


def test_any_spec_is_predicted_or_refused():
    found = Counter()
    predicted_or_refused(found)
    assert found["a step"] > 600 and found["states"] > 120 and found["refused"] > 400, found
    assert all(found[method] for method in METHODS), found


@settings(max_examples=200, **FIXED)
@given(values=RUNS, json_too=st.booleans())
def test_any_command_line_ends_with_0_or_2(values, json_too):
    argv = ["memory", "--json"] if json_too else ["memory"]
    for name, given_value in values.items():
        if isinstance(given_value, bool):
            argv.append(f"--{'' if given_value else 'no-'}{name.replace('_', '-')}")
        elif given_value is not None:
            argv += [f"--{name.replace('_', '-')}", str(given_value)]
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as wrong:
        status = main(argv)
    out, err = said.getvalue(), wrong.getvalue()
    assert status in (0, 2) and "Traceback" not in err
    if status == 2:
        assert out == "" and len(err.splitlines()) == 1
    elif json_too:
        assert json.loads(out)["spec"]["model"]
