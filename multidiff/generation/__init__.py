"""Documents with blanks in, the same documents filled in out."""

from multidiff.generation.pipeline import Blank, Filled, Given, Masked, MultiDiffOutput, MultiDiffPipeline

__all__ = ["Blank", "Filled", "Given", "Masked", "MultiDiffOutput", "MultiDiffPipeline"]
