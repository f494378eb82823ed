"""Data: folders a user can write by hand, tokenized once into shards, served as batches."""

from multidiff.data.batches import EpochBatches, ShuffledBatches
from multidiff.data.folder import read_metadata
from multidiff.data.module import BatchedData, DocumentDataModule

__all__ = ["BatchedData", "DocumentDataModule", "EpochBatches", "ShuffledBatches", "read_metadata"]
