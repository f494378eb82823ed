"""Data: sources of documents, tokenized once into shards, served as batches."""

from multidiff.data.batches import EpochBatches, ShuffledBatches
from multidiff.data.module import BatchedData, DocumentDataModule
from multidiff.data.sources import Folder, Mixture, Source, Table
from multidiff.data.sources.folder import read_metadata

__all__ = [
    "BatchedData",
    "DocumentDataModule",
    "EpochBatches",
    "Folder",
    "Mixture",
    "ShuffledBatches",
    "Source",
    "Table",
    "read_metadata",
]
