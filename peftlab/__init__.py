"""peftlab: parameter-efficient fine-tuning, counted, predicted, trained and compared.

    from peftlab import RunSpec, count, predict
    count(RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj")).trainable_parameters  # 4194304

`peftlab.run` trains and `peftlab.compare` generates; they import torch when they are used.
"""

from .count import ParameterReport, count
from .errors import AdapterError, PeftlabError, RunError, SpecError, WeightsError
from .memory import MemoryReport, predict
from .resolve import resolve
from .spec import RunSpec

__version__ = "0.2.0"

__all__ = [
    "AdapterError",
    "MemoryReport",
    "ParameterReport",
    "PeftlabError",
    "RunError",
    "RunSpec",
    "SpecError",
    "WeightsError",
    "count",
    "predict",
    "resolve",
]
