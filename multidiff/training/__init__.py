"""Training with Lightning: the module, the optimizer, callbacks, checkpoints, and the strategy `fsdp2`."""

from multidiff.training.callbacks import AveragedWeights, Previews, SaveModel
from multidiff.training.checkpoints import Checkpoints, WholeFiles
from multidiff.training.module import MaskedDiffusionModule
from multidiff.training.optimizer import MuonAdamW
from multidiff.training.sharding import FullyShardedStrategy
from multidiff.training.throughput import Throughput

__all__ = [
    "AveragedWeights",
    "Checkpoints",
    "FullyShardedStrategy",
    "MaskedDiffusionModule",
    "MuonAdamW",
    "Previews",
    "SaveModel",
    "Throughput",
    "WholeFiles",
]
