"""Where the page and the data are: inside the package once it is installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_BUNDLE = Path(__file__).parent / "bundle"
ROOT = _BUNDLE if _BUNDLE.is_dir() else _BUNDLE.parent.parent
"""The folder that holds app.py, demos/ and assets/; pyproject.toml says how they get into the package."""
ASSETS = ROOT / "assets"
