"""Visitors: a signed token that a browser keeps, and links that open for a while what is somebody's own."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from pathlib import Path

from ..errors import SpecError

log = logging.getLogger(__name__)
TOKEN, LINK = "token", "link"
"""What a signature is for."""
LEAST = 16
"""Bytes. A shorter key could be guessed."""
SIGNED = 32
"""Hexadecimal digits of a signature."""
DAY = 24 * 3600
"""Seconds. A link to something of one's own stays good for one to two of them."""


class Signer:
    """Signs with the key in `file`, which is made once and outlives the server: a restart forgets nobody.

    What is signed for one purpose is nothing for the other: a link is no token. Tokens are signed with the key itself, as
    they were before links had a key of their own, so browsers that have one stay known.
    """

    def __init__(self, file: Path) -> None:
        """Makes a new key where the file has none that is hard to guess. Raises SpecError where that cannot be done."""
        try:
            key = _key(file)
        except OSError as error:
            said = f"{file}: the key that signs visitors' tokens cannot be read or made ({error.strerror})"
            raise SpecError(f"{said}; let this user read and write it, or give PEFTLAB_DATA another folder") from None
        self._keys = {TOKEN: key, LINK: hmac.digest(key, LINK.encode(), "sha256")}

    def sign(self, text: str, purpose: str = TOKEN) -> str:
        """`text` with its signature."""
        return f"{text}.{self._of(text, purpose)}"

    def read(self, signed: object, purpose: str = TOKEN) -> str:
        """The text that was signed here for this purpose; empty for anything else."""
        text, _, given = signed.rpartition(".") if isinstance(signed, str) and signed.isascii() else ("", "", "")
        return text if text and hmac.compare_digest(given, self._of(text, purpose)) else ""

    def newcomer(self) -> str:
        """A new visitor's token."""
        return self.sign(secrets.token_hex(16))

    def opens(self, what: str) -> str:
        """A signed name of something that whoever has it may fetch until tomorrow ends; the same all day."""
        return self.sign(f"{what}~{(int(time.time()) // DAY + 2) * DAY}", LINK)

    def opened(self, name: object) -> str:
        """What a name from `opens` gives access to; empty for any other, and once its time is over."""
        what, _, until = self.read(name, LINK).rpartition("~")
        return what if until.isdecimal() and int(until) >= time.time() else ""

    def _of(self, text: str, purpose: str) -> str:
        return hmac.new(self._keys[purpose], text.encode(), hashlib.sha256).hexdigest()[:SIGNED]


def _key(file: Path) -> bytes:
    """The key in `file`, made where there is none and in place of one that could be guessed. Raises OSError."""
    if file.exists():
        key = file.read_bytes()
        if len(key.strip(b"\0")) >= LEAST:  # a power cut can leave a file of zeros
            return key
        log.warning(
            "%s: this key could be guessed, so a new one is made; whoever was here before is a new visitor", file
        )
        file.unlink()
    made = file.with_name(f"{file.name}.{os.getpid()}")
    made.touch(mode=0o600)
    with made.open("wb") as to:
        to.write(secrets.token_bytes(32))
        to.flush()
        os.fsync(to.fileno())
    try:
        os.link(made, file)  # where two begin at once, the first one's stays
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(made, file)
    made.unlink(missing_ok=True)
    return file.read_bytes()
