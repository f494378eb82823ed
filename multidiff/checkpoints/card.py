"""The model card, `README.md`: what the model is, and code that runs it.

`model_index.json` records the hash of a card that was generated. A card with another hash was edited, and is kept.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from multidiff import files
from multidiff.checkpoints.parts import ModelParts

CARD, CARD_HASH = "README.md", "_card_sha256"


def edited_card(folder: Path) -> bytes | None:
    """The card in `folder` if a person wrote or edited it; None if it is the generated one, or if there is none."""
    card, index = folder / CARD, folder / "model_index.json"
    if not os.path.lexists(card):
        return None
    content = files.read_bytes(card)
    recorded = files.read_json(index).get(CARD_HASH) if os.path.lexists(index) else None
    return None if recorded == card_hash(content) else content


def card_hash(card: bytes) -> str:
    """The hex digest by which `edited_card` recognizes a generated card."""
    return hashlib.sha256(card).hexdigest()


def generate_card(parts: ModelParts) -> bytes:
    """A card with the model's size and tokenizers, and code that generates with it."""
    rows = "\n".join(
        f"| `{name}` | {layout.modality} | `{layout.plugin}` | {' + '.join(map(str, layout.codebook_sizes))} |"
        for name, layout in parts.vocabulary.tokenizers.items()
    )
    code, imports = _example(parts)
    kind = "autoregressive" if parts.transformer.pattern.is_autoregressive else "masked diffusion"
    parameters = sum(weight.numel() for weight in parts.transformer.parameters())
    return f"""---
library_name: multidiff
tags: [{kind.replace(" ", "-")}, multimodal]
---

# A multidiff model

Its {kind} transformer has {parameters:,} parameters. It was trained with these tokenizers:

| name | modality | plugin | codebook sizes |
|---|---|---|---|
{rows}

```python
from multidiff import {imports}

pipe = MultiDiffPipeline.from_pretrained("path/to/this/folder")
{code}
```

`samplers.json` contains the sampling settings. Loading this model runs no code from this folder.
""".encode()


def _example(parts: ModelParts) -> tuple[str, str]:
    """Code that generates with up to two of the model's tokenizers, from a text if it has one, and its imports."""
    layouts = parts.vocabulary.tokenizers
    names = sorted(layouts, key=lambda name: layouts[name].modality != "text")[:2]
    segments = [f'Blank("{name}")' for name in names]
    imports = "Blank, MultiDiffPipeline"
    if len(names) == 2 and layouts[names[0]].modality == "text":
        segments[0], imports = f'Given("{names[0]}", "seven")', "Blank, Given, MultiDiffPipeline"
    places = parts.seen.order_of(names) if parts.seen else None
    ordered = [segments[place] for place in places] if places else segments
    code = f"document = pipe([[{', '.join(ordered)}]]).documents[0]\nprint([part.item for part in document])"
    return code, imports
