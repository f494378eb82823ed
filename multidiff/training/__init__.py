"""Training with Lightning: the module, the optimizer, callbacks and checkpoints."""

from multidiff.training.callbacks import AveragedWeights, Previews, SaveModel
from multidiff.training.checkpoints import Checkpoints, WholeFiles
from multidiff.training.module import MaskedDiffusionModule
from multidiff.training.optimizer import MuonAdamW
from multidiff.training.throughput import Throughput

__all__ = [
    "AveragedWeights",
    "Checkpoints",
    "MaskedDiffusionModule",
    "MuonAdamW",
    "Previews",
    "SaveModel",
    "Throughput",
    "WholeFiles",
]
