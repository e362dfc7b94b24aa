"""The rules of the code and of the look that a machine can check."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import ROOT

from peftlab.show import figures

BIN = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
OURS = [f for folder in ("peftlab", "demos") for f in (ROOT / folder).rglob("*.py")] + [ROOT / "app.py"]
LOOK = {
    "light": {"frozen": "#0072B2", "trained": "#D55E00", "gradients": "#E69F00", "optimizer": "#CC79A7",
              "activations": "#009E73", "logits": "#8C7A00", "overhead": "#6B7280"},
    "dark": {"frozen": "#56B4E9", "trained": "#FF8F4A", "gradients": "#F2B84B", "optimizer": "#E3A0C5",
             "activations": "#3CC79E", "logits": "#F0E442", "overhead": "#9CA3AF"},
}  # fmt: skip


def imports(file):
    """What a file imports when it runs: what stands under `if TYPE_CHECKING` is for mypy alone."""
    tree = ast.parse(file.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            yield from (str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.skipif(find_spec("importlinter") is None, reason="import-linter is missing")
def test_the_layers_keep_their_order():
    """The contracts of pyproject.toml: no folder uses what stands above it, and the backend knows nothing of Gradio."""
    done = subprocess.run(["lint-imports"], cwd=ROOT, env=os.environ | {"PATH": BIN}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_picture_of_the_layers_is_the_contracts():
    made = subprocess.run([sys.executable, ".ci/layers"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "assets" / "layers.svg").read_text()


def test_one_file_knows_transformers_inside():
    """Others ask it for the library, whose documented names they use; the bench runs the peers' own trainers."""
    found = {
        f.relative_to(ROOT / "peftlab").as_posix()
        for f in (ROOT / "peftlab").rglob("*.py")
        if "transformers" in imports(f)
    }
    assert found == {"seam.py", "bench/peers.py"}


def test_importing_peftlab_is_cheap():
    heavy = ("torch", "transformers", "peft", "gradio", "plotly")
    code = f"import peftlab, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_counting_and_predicting_a_catalogue_model_need_no_torch():
    code = (
        "import peftlab, sys; s = peftlab.RunSpec(model='llama-3.1-8b'); r = peftlab.resolve(s); "
        "peftlab.count(r); peftlab.predict(r); "
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", OURS, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_remote_code_is_trusted(file):
    text = file.read_text()
    assert not re.search(r"\btorch\.load\(|trust_remote_code\s*=\s*True", text)
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(imports(file))


@pytest.mark.parametrize("theme", figures.THEMES)
def test_charts_have_the_palette_of_the_look(theme):
    assert {k: figures.PALETTE[theme][k] for k in LOOK[theme]} == LOOK[theme]


@pytest.mark.parametrize("theme", figures.THEMES)
def test_the_page_has_the_charts_colours(theme):
    css = (ROOT / "assets" / "style.css").read_text()
    block = re.search({"light": r":root\s*{(.*?)}", "dark": r"\.dark\s*{(.*?)}"}[theme], css, re.DOTALL)[1]
    found = dict(re.findall(r"--([\w-]+):\s*(#[0-9A-Fa-f]{6})", block))
    for name in ("frozen", "trained", "gradients", "optimizer"):
        assert found[name].upper() == LOOK[theme][name]
    assert (found["ink"], found["muted"], found["surface"]) == tuple(
        figures.PALETTE[theme][k] for k in ("text", "muted", "surface")
    )


def contrast(a, b):
    """WCAG 2 contrast ratio of two hex colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_wcags():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21) and contrast("#777777", "#FFFFFF") == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.parametrize("theme", figures.THEMES)
def test_text_can_be_read(theme):
    colours = figures.PALETTE[theme]
    for name in ("text", "muted"):
        assert contrast(colours[name], colours["surface"]) >= 4.5


@pytest.mark.parametrize("theme", figures.THEMES)
def test_text_in_a_colour_of_the_page_can_be_read(theme):
    css = (ROOT / "assets" / "style.css").read_text()
    block = re.search({"light": r":root\s*{(.*?)}", "dark": r"\.dark\s*{(.*?)}"}[theme], css, re.DOTALL)[1]
    found = dict(re.findall(r"--([\w-]+):\s*(#[0-9A-Fa-f]{6})", block))
    for name in ("frozen", "trained-text", "good", "bad", "muted", "ink"):
        assert contrast(found[name], found["surface"]) >= 4.5, name
