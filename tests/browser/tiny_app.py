"""`python tiny_app.py FOLDER`: the app over a tiny model in FOLDER."""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import LLAMA, TOY, make_model

from peftlab.base import models
from peftlab.data import tasks

folder = make_model(Path(sys.argv[1]) / "tiny", LLAMA)
tiny = models.find(str(folder))
models.MODELS[models.DEFAULT] = replace(
    tiny, key=models.DEFAULT, name="Tiny Llama", hub_id="tiny/llama", total_parameters=195_008
)
tasks.TASKS[tasks.DEFAULT] = replace(TOY, key=tasks.DEFAULT)

import app

app.main()
