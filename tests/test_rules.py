"""The rules of the code and of the look that a machine can check, so that one command says whether the tree is sound."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from peftlab.show import figures

BIN = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


@pytest.mark.parametrize("command", ["lint-imports", "ruff check", "ruff format --check", "mypy peftlab demos app.py"])
def test_clean(command):
    """`lint-imports` holds pyproject.toml's contracts: no folder uses what is above it; the backend knows no Gradio."""
    tool, *rest = command.split()
    if not (found := shutil.which(tool, path=BIN)):
        pytest.skip(f"{tool} is missing")
    done = subprocess.run([found, *rest], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imports(file):
    """What a file imports when it runs: what stands under `if TYPE_CHECKING` is for mypy alone."""
    tree = ast.parse(file.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.split(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]
            case ast.Call(ast.Name(name) | ast.Attribute(attr=name), args) if name in ("import_module", "__import__"):
                yield from (str(a.value).split(".")[0] for a in args if isinstance(a, ast.Constant))


def test_the_picture_of_the_layers_is_the_contracts():
    made = subprocess.run([sys.executable, ".ci/layers"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "assets" / "layers.svg").read_text()


def test_the_seam_alone_knows_transformers_inside():
    """Others ask it for the library, whose documented names they use; the bench runs the peers' own trainers."""
    files = (ROOT / "peftlab").rglob("*.py")
    found = {f.relative_to(ROOT / "peftlab").as_posix() for f in files if "transformers" in imports(f)}
    assert found == {"seam.py", "caches.py", "bench/peers.py"}


def test_importing_peftlab_counting_and_predicting_load_nothing_heavy():
    code = (
        "import peftlab, sys; s = peftlab.resolve(peftlab.RunSpec(model='llama-3.1-8b')); peftlab.count(s); "
        "peftlab.predict(s); print({'torch', 'transformers', 'peft', 'gradio', 'plotly'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_command_line_needs_neither_gradio_nor_plotly():
    code = (
        "import sys; sys.modules |= {'gradio': None, 'plotly': None}; from peftlab.cli import main; "
        "from peftlab.cli._shared import note_event; note_event({'type': 'loading', 'model': 'a model'}); main(['methods'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "loading a model" in done.stderr, done.stderr


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    for file in [f for folder in ("peftlab", "demos") for f in (ROOT / folder).rglob("*.py")] + [ROOT / "app.py"]:
        assert not re.search(r"\btorch\.load\(|trust_remote_code\s*=\s*True", file.read_text()), file
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(imports(file)), file


def contrast(*colours):
    """WCAG 2 contrast ratio of two hex colours."""
    parts = [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours]
    linear = [[p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in rgb] for rgb in parts]
    dark, light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme, rule", [("light", r":root\s*{(.*?)}"), ("dark", r"\.dark\s*{(.*?)}")])
def test_the_page_has_the_charts_colours_and_text_in_them_can_be_read(theme, rule):
    block = re.search(rule, (ROOT / "assets" / "style.css").read_text(), re.DOTALL)[1]
    page = dict(re.findall(r"--([\w-]+):\s*(#[0-9A-Fa-f]{6})", block))
    named = {"text": "ink", "border": "line"}
    assert {name: page[named.get(name, name)] for name in figures.PALETTE[theme]} == figures.PALETTE[theme]
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)
    for name in ("frozen", "trained-text", "good", "bad", "muted", "ink"):
        assert contrast(page[name], page["surface"]) >= 4.5, name


def test_no_library_and_no_large_file_slips_into_the_repository():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout")
    files = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    large = [name for name in files if (ROOT / name).stat().st_size > 2e6]
    assert large == ["assets/adapters/ticket-lora-r64/adapter_model.safetensors"]  # its lecture needs rank 64
    assert [name for name in files if name.endswith((".whl", ".tar.gz"))] == []
