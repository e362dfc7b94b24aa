"""What the server says of itself on stderr: its own warnings and errors, as lines of text or of JSON."""

import json
import logging
import time


class Lines(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, and `traceback` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        told = {"time": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


TEXT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def to_stderr(form: str) -> None:
    """Writes what this server logs, as `text` or `json`; what libraries log stays unheard."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(Lines() if form == "json" else TEXT)
    for name in ("peftlab", "demos"):
        logging.getLogger(name).addHandler(handler)
