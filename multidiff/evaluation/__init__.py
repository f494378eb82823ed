"""Measurements: the likelihood of documents and of parts of them given others, whether samplers mend wrong codes, how
well tokenizers use their codes, and how much of a picture or sound a reconstruction keeps.
`multidiff.evaluation.harness` is imported on its own."""

from multidiff.evaluation.bounds import Bounds, Estimate, bounds_table, measure_folder
from multidiff.evaluation.conditional import Choice, LogLikelihood, Target, log_likelihood, multiple_choice
from multidiff.evaluation.correction import Correction, Share, measure_correction
from multidiff.evaluation.fidelity import align_sounds, picture_fidelity, speech_fidelity, text_fidelity
from multidiff.evaluation.likelihood import BoundSums, EvaluationBatch, likelihood, modes
from multidiff.evaluation.metrics import (
    code_agreement,
    code_distribution,
    codebook_entropy,
    codebook_usage,
    information,
    survives_saving,
)

__all__ = [
    "BoundSums",
    "Bounds",
    "Choice",
    "Correction",
    "Estimate",
    "EvaluationBatch",
    "LogLikelihood",
    "Share",
    "Target",
    "align_sounds",
    "bounds_table",
    "code_agreement",
    "code_distribution",
    "codebook_entropy",
    "codebook_usage",
    "information",
    "likelihood",
    "log_likelihood",
    "measure_correction",
    "measure_folder",
    "modes",
    "multiple_choice",
    "picture_fidelity",
    "speech_fidelity",
    "survives_saving",
    "text_fidelity",
]
