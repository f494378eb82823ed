"""Measurements: the likelihood of documents, how well tokenizers use their codes, and how much of a picture or sound a
reconstruction keeps."""

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
    "EvaluationBatch",
    "align_sounds",
    "code_agreement",
    "code_distribution",
    "codebook_entropy",
    "codebook_usage",
    "information",
    "likelihood",
    "modes",
    "picture_fidelity",
    "speech_fidelity",
    "survives_saving",
    "text_fidelity",
]
