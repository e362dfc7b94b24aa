"""A config.json pasted, its key, and the line that it is refused with."""

from __future__ import annotations

import base64
import json
import time
import zlib

import pytest

from peftlab import SpecError
from peftlab.base import models


def pasted(config, **changes):
    return models.from_config(json.dumps({**config, **changes}))


def refused(work, *args, **kwargs):
    """The one line that `work` is refused with, within two seconds."""
    start = time.monotonic()
    with pytest.raises(SpecError) as refusal:
        work(*args, **kwargs)
    assert time.monotonic() - start < 2
    said = str(refusal.value)
    assert "\n" not in said and len(said) < 600 and "; " in said  # what is wrong; what to do
    return said


def packed(text) -> str:
    return "config:" + base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode().rstrip("=")
