"""What the page costs its server, measured in a process of its own, for peftlab itself never imports gradio."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PeftlabError
from ..measured import provenance
from ..places import ROOT


def record_page(out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Processor time of every tab's answers to random settings (ms) and the page's configuration (bytes); to `out`."""
    done = subprocess.run([sys.executable, str(ROOT / "demos" / "page" / "measure.py")], capture_output=True, text=True)
    if done.returncode:
        raise PeftlabError(f"the page could not be measured: {done.stderr.strip().splitlines()[-1]}")
    document = provenance() | {"kind": "page", **json.loads(done.stdout.splitlines()[-1])}
    for tab, found in document["answers_milliseconds"].items():
        say(f"{tab}: an answer takes {found['median']:.1f} ms of processor time, 95% at most {found['p95']:.1f}")
    kilo, packed = document["config_bytes"] / 1000, document["config_gzip_bytes"] / 1000
    say(f"the page's configuration: {kilo:.0f} kB, {packed:.0f} kB compressed")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
