"""Selective state space models (Mamba) without a deep-learning framework.

    import ssmcore
    model = ssmcore.load()
    print(model.generate("It is a truth universally acknowledged, that"))

`load` opens a model and `save` writes one, `Model` generates, scores and gives logits, `ops` holds
the operators, and an `Array` is memory on any device. Every failure is an `Error`.
"""

from ssmcore import ops
from ssmcore._core import __version__, num_threads, set_num_threads
from ssmcore.arrays import Array, array, cuda_device_count, empty, synchronize
from ssmcore.decoder import Decoder
from ssmcore.errors import BackendError, Error, InvalidArgumentError, NotFiniteError
from ssmcore.initialization import create
from ssmcore.library import get_library
from ssmcore.loading import load, save
from ssmcore.model import Model
from ssmcore.scoring import Score
from ssmcore.state import State
from ssmcore.trainer import Trainer, TrainingStep

__all__ = [
    "Array",
    "BackendError",
    "Decoder",
    "Error",
    "InvalidArgumentError",
    "Model",
    "NotFiniteError",
    "Score",
    "State",
    "Trainer",
    "TrainingStep",
    "__version__",
    "array",
    "create",
    "cuda_device_count",
    "empty",
    "get_library",
    "load",
    "num_threads",
    "ops",
    "save",
    "set_num_threads",
    "synchronize",
]
