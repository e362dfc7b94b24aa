"""`python small_app.py FOLDER`: the page over the small models in FOLDER, for `python -m peftlab bench room`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peftlab.bench import small

small.register(Path(sys.argv[1]))

import app  # only now, because the page's tabs list the models as they are imported

app.main()
