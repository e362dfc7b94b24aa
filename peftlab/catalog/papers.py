"""Papers that methods and conventions come from. `papers.json` holds one a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paper:
    key: str
    authors: str
    year: int
    title: str
    venue: str
    url: str

    @property
    def citation(self) -> str:
        return f"{self.authors} ({self.year}), {self.title}"


PAPERS: dict[str, Paper] = {
    key: Paper(key, **entry) for key, entry in json.loads((Path(__file__).parent / "papers.json").read_text()).items()
}
