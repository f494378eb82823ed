"""Data: folders a user can write by hand, tokenized once into shards, served as batches."""

from multidiff.data.module import DocumentDataModule

__all__ = ["DocumentDataModule"]
