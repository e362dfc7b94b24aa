"""ZeroGPU as a Space meets it: the device server that the package `spaces` asks for a GPU, with a quota for each visitor.

`spaces` itself forks the processes, pickles what goes in and out, and says what is wrong, so that this is its own behaviour.
Only what it does to torch is left out, for want of a GPU. `python zerogpu.py FOLDER` is the app on such a Space: the one in
FOLDER, else this one over a tiny model that is made there.
"""

import base64
import contextlib
import json
import os
import signal
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

DAY = 120.0
"""Seconds of GPU time that a visitor without an account has a day."""


class Device(ThreadingHTTPServer):
    """Lends GPUs. A call has to be within its visitor's quota, is killed once its time is over, and is charged what it used."""

    daemon_threads = True

    def __init__(self, slower: float = 1.0) -> None:
        """So many seconds of this machine count as one, because it takes that much longer than a GPU."""
        super().__init__(("127.0.0.1", 0), _Answers)
        self.slower = slower
        self.left: dict[str, float] = {}
        """Seconds that each visitor has left, by name."""
        self.calls: list[dict] = []
        """Each with `visitor`, seconds `asked` and `used`, the process's `pid`, and whether it was `killed`."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What a ZeroGPU Space has in its environment."""
        return {
            "SPACES_ZERO_GPU": "true",
            "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{self.server_port}",
            "ZEROGPU_PROC_SELF_CGROUP_PATH": "/proc/self/cgroup",
        }

    def schedule(self, token: str, durationSeconds: str = "60", **_: str) -> tuple[int, object]:
        visitor = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))["user"] if token else ""
        asked, left = float(durationSeconds), self.left.setdefault(visitor, DAY)
        if asked > left:
            return 429, {"left": int(left), "wait": 5 * 3600 if left < DAY else -1}
        self.calls.append({"visitor": visitor, "asked": asked, "used": None, "pid": None, "killed": False})
        return 200, {
            "idle": False,
            "nvidiaIndex": len(self.calls),
            "nvidiaUUID": "GPU",
            "allowToken": str(len(self.calls)),
        }

    def allow(self, allowToken: str, pid: str, **_: str) -> tuple[int, object]:
        call = self.calls[int(allowToken) - 1]
        call |= {"pid": int(pid), "began": time.monotonic()}
        timer = threading.Timer(call["asked"] * self.slower, self._over, [call])
        timer.daemon = True
        timer.start()
        return 200, {}

    def release(self, allowToken: str, **_: str) -> tuple[int, object]:
        call = self.calls[int(allowToken) - 1]
        if call["used"] is None and call["pid"]:
            call["used"] = (time.monotonic() - call["began"]) / self.slower
            self.left[call["visitor"]] -= call["used"]
        return 200, {}

    def _over(self, call: dict) -> None:
        if call["used"] is None:
            call["killed"] = True
            with contextlib.suppress(OSError):
                os.kill(call["pid"], signal.SIGKILL)


class _Answers(BaseHTTPRequestHandler):
    server: Device

    def do_POST(self) -> None:
        asked = urlparse(self.path)
        arguments = {"token": ""} | {name: one for name, (one, *_) in parse_qs(asked.query).items()}
        answers = {"/schedule": self.server.schedule, "/allow": self.server.allow, "/release": self.server.release}
        status, said = answers[asked.path](**arguments) if asked.path in answers else (200, {})
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def token(visitor: str) -> str:
    """What Hugging Face's proxy adds to a visitor's requests as X-IP-Token."""
    return f"h.{base64.urlsafe_b64encode(json.dumps({'user': visitor}).encode()).decode().rstrip('=')}.s"


def _without_torch() -> None:
    """Has `spaces` find nothing to do to torch."""
    module = types.ModuleType("spaces.zero.torch")
    for name in ("enter_mode", "patch", "unpatch", "init", "move"):
        setattr(module, name, lambda *_, **__: None)
    module.pack = module.size = lambda *_, **__: 0
    module.is_in_bad_fork = lambda: False
    sys.modules[module.__name__] = module


if __name__ == "__main__":
    _without_torch()
    written = (Path(sys.argv[1]) / "app.py").exists()
    sys.path.insert(0, sys.argv[1] if written else str(Path(__file__).resolve().parents[2]))
    from peftlab import hardware

    cpu = hardware.Machine("cpu", "here", None, 2, 10**12)
    hardware.here = lambda: cpu
    if written:
        import app

        app.main()
    else:
        import tiny_app  # noqa: F401  it serves
