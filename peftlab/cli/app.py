"""`peftlab app`: the page, in a process of its own."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace

from ..errors import SpecError
from ..places import ROOT
from ._shared import Commands, port


def add(commands: Commands) -> None:
    about = "the page, in a process of its own, until Ctrl-C"
    parser = commands.add_parser("app", help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--host", help="the address to answer at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=port, help="its port (default: the first free one from 7860)")


def run(args: Namespace) -> int:
    """Returns the exit status of the page's process, as a shell tells it."""
    try:
        socket.getaddrinfo(args.host or "127.0.0.1", None)
        socket.create_server((args.host or "127.0.0.1", args.port or 0)).close()
    except socket.gaierror:
        raise SpecError(
            f"host={args.host}: no such address on this machine; give another one, such as 0.0.0.0"
        ) from None
    except OSError as error:
        named = f"port={args.port}" if args.port else f"host={args.host}"
        raise SpecError(f"{named}: cannot be used ({error.strerror}); give another one") from None
    if missing := [name for name in ("gradio", "plotly") if importlib.util.find_spec(name) is None]:
        raise SpecError(f"app: the page needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    asked = {"GRADIO_SERVER_NAME": args.host, "GRADIO_SERVER_PORT": args.port}
    environment = os.environ | {name: str(value) for name, value in asked.items() if value}
    # In a session of its own, a terminal's Ctrl-C reaches the page once, by way of this process.
    page = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=environment, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: page.send_signal(signal.SIGINT if got == signal.SIGHUP else got))
    status = page.wait()
    return status if status >= 0 else 128 - status
