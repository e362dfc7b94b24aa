"""The trainers that ours is held against, one file each. To add one, write a file here that registers a `Peer`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from ...errors import SpecError
from ...spec import Json, Resolved, closest

YARDSTICK = "transformers Trainer"
"""The peer whose step the others' are compared with."""


@dataclass(frozen=True)
class Peer:
    name: str
    package: str
    """What it imports; a peer whose package is not installed is left out."""
    run: Callable[[Resolved], Json]
    """Trains a run, with its seed, and returns what `Watch.finish` does and the held-out `score`, from 0 to 1."""
    turn: int
    """Peers run in this order. Liger changes transformers' own classes, so it has to be the last."""
    seeded: bool = False
    """Its scores are compared over several seeds; for the others one run is enough to tell the speed."""


PEERS: dict[str, Peer] = {}


def register(*peers: Peer) -> None:
    PEERS.update({peer.name: peer for peer in peers})


def find(name: str) -> Peer:
    """Raises SpecError for an unknown name."""
    if name not in PEERS:
        raise SpecError(f"peer={name}: no such trainer; {closest(name, PEERS)}")
    return PEERS[name]


def _discover() -> None:
    """Imports every file of this folder, and puts the peers in the order of their turns."""
    for file in iter_modules(__path__):
        import_module(f".{file.name}", __name__)
    for name in sorted(PEERS, key=lambda name: PEERS[name].turn):
        PEERS[name] = PEERS.pop(name)


_discover()
