"""What an extra brings is imported where it is needed, and named where it is missing."""

import sys
from importlib import import_module

import pytest


def test_the_adapter_to_lm_eval_names_its_extra(monkeypatch):
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "multidiff.evaluation.harness", raising=False)
    with pytest.raises(ImportError, match=r'pip install "masked-multidiff\[lm-eval\]"'):
        import_module("multidiff.evaluation.harness")
