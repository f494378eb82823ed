"""Sources: where documents come from, and how they are written down there."""

from multidiff.data.sources.folder import Folder
from multidiff.data.sources.mixture import Mixture
from multidiff.data.sources.source import SPLITS, Record, Source
from multidiff.data.sources.table import Table
from multidiff.data.sources.template import Template

__all__ = ["SPLITS", "Folder", "Mixture", "Record", "Source", "Table", "Template"]
