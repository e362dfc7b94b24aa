"""What the page costs its server, measured in a process of its own, because peftlab itself never imports gradio."""

import json
import subprocess
import sys
from pathlib import Path

from ..errors import PeftlabError
from ..measured import provenance
from ..places import ROOT
from ..spec import Json
from . import Say, write


def record_page(out: Path, say: Say) -> Json:
    """Writes to `out` the processor time of every tab's answers to random settings, in milliseconds, and the size of the
    page's configuration, in bytes. Raises PeftlabError where the page cannot be measured.
    """
    done = subprocess.run([sys.executable, str(ROOT / "demos" / "page" / "measure.py")], capture_output=True, text=True)
    if done.returncode:
        raise PeftlabError(f"the page could not be measured: {done.stderr.strip().splitlines()[-1]}")
    document = provenance() | {"kind": "page", **json.loads(done.stdout.splitlines()[-1])}
    for tab, found in document["answers_milliseconds"].items():
        say(f"{tab}: an answer takes {found['median']:.1f} ms of processor time, 95% at most {found['p95']:.1f}")
    kilo, packed = document["config_bytes"] / 1000, document["config_gzip_bytes"] / 1000
    say(f"the page's configuration: {kilo:.0f} kB, {packed:.0f} kB compressed")
    return write(document, out)
