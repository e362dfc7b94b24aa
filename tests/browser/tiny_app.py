"""`python tiny_app.py FOLDER`: the app over a tiny model in FOLDER, whose IA³ starts from NaN."""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import LLAMA, TOY, make_model

from peftlab.base import models
from peftlab.data import tasks
from peftlab.methods import METHODS


def broken(model, targets, spec, attach=METHODS["ia3"].attach):
    import torch

    model = attach(model, targets, spec)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    return model


folder = make_model(Path(sys.argv[1]) / "tiny", LLAMA)
tiny = models.find(str(folder))
models.MODELS[models.DEFAULT] = replace(
    tiny, key=models.DEFAULT, name="Tiny Llama", hub_id="tiny/llama", total_parameters=195_008
)
tasks.TASKS[tasks.DEFAULT] = replace(TOY, key=tasks.DEFAULT)
METHODS["ia3"] = replace(METHODS["ia3"], attach=broken)

import app

app.main()
