"""Names of a package that are imported once somebody asks for them, so that what its work takes is not loaded before."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exported(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562), which takes each name from the module of the package that `names` gives."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{names[name]}"), name)

    return find
