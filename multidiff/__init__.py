"""multidiff: one masked diffusion transformer for text, images, audio and whatever a plugin brings.

Names are imported on first use, so `import multidiff` costs nothing.
"""

from importlib import import_module

__version__ = "0.2.0"
_HOME = {
    "AncestralSampler": "samplers",
    "Blank": "generation",
    "Draft": "generation",
    "Given": "generation",
    "MaskSampler": "samplers",
    "MaskedDiffusionTransformer": "models",
    "MultiDiffPipeline": "generation",
    "Masked": "generation",
    "SharedVocabulary": "sequence",
    "Audio": "tokenizer",
    "Codes": "tokenizer",
    "ModalityTokenizer": "tokenizer",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"multidiff.{_HOME[name]}"), name)
    raise AttributeError(f"module 'multidiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
