"""Documents with blanks in, the same documents filled in out."""

from multidiff.generation.pipeline import MultiDiffOutput, MultiDiffPipeline
from multidiff.generation.requests import Blank, Draft, Filled, Given, Masked

__all__ = ["Blank", "Draft", "Filled", "Given", "Masked", "MultiDiffOutput", "MultiDiffPipeline"]
