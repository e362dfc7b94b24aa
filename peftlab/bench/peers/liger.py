"""transformers' Trainer with Liger's kernels."""

from functools import partial

from . import Peer, register, trainer

register(Peer("Trainer with Liger", "liger_kernel", partial(trainer.run, use_liger_kernel=True), turn=9))
