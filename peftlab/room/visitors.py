"""Visitors: a signed token that a browser keeps, and links that open for a while what is somebody's own."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

SIGNED = 32
"""Hexadecimal digits of a signature."""
DAY = 24 * 3600
"""Seconds. A link to something of one's own stays good for one to two of them."""


class Signer:
    """Signs with the key in `file`, which is made once and outlives the server: a restart forgets nobody."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            made = file.with_name(f"{file.name}.{os.getpid()}")
            made.touch(mode=0o600)
            made.write_bytes(secrets.token_bytes(32))
            try:
                os.link(made, file)  # where two begin at once, the first one's stays
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                os.replace(made, file)
            made.unlink(missing_ok=True)
        self._key = file.read_bytes()

    def sign(self, text: str) -> str:
        """`text` with its signature."""
        return f"{text}.{self._of(text)}"

    def read(self, signed: object) -> str:
        """The text that was signed here; empty for anything else."""
        text, _, given = signed.rpartition(".") if isinstance(signed, str) and signed.isascii() else ("", "", "")
        return text if text and hmac.compare_digest(given, self._of(text)) else ""

    def newcomer(self) -> str:
        """A new visitor's token."""
        return self.sign(secrets.token_hex(16))

    def opens(self, what: str) -> str:
        """A signed name of something that whoever has it may fetch until tomorrow ends; the same all day."""
        return self.sign(f"{what}~{(int(time.time()) // DAY + 2) * DAY}")

    def opened(self, name: object) -> str:
        """What a name from `opens` gives access to; empty for any other, and once its time is over."""
        what, _, until = self.read(name).rpartition("~")
        return what if until.isdecimal() and int(until) >= time.time() else ""

    def _of(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:SIGNED]
