"""Documents with blanks in, the same documents filled in out."""

from multidiff.generation.pipeline import Blank, Filled, Given, MultiDiffOutput, MultiDiffPipeline, Partial

__all__ = ["Blank", "Filled", "Given", "MultiDiffOutput", "MultiDiffPipeline", "Partial"]
