"""A data folder of random texts, each of whose characters is a code, and a configuration that trains on them."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from multidiff.seeding import generator_for
from multidiff_bpe import BPETokenizer

_FIRST = 0x4E00  # of 20,992 characters that are neither spaces nor composed of others
_BYTES = 256  # codes of a character tokenizer that these texts do not use
_AROUND = 4  # tokens of a document besides its characters: <bos>, the begin and the end of the text, and its EOS
LARGEST_VOCABULARY = _BYTES + 20_992


def write_configuration(folder: Path, vocabulary: int, length: int, documents: int, batch: int) -> Path:
    """A configuration in the folder, beside the data and the tokenizer that it names.

    Args:
        folder: to write to.
        vocabulary: codes of the tokenizer.
        length: tokens of each document.
        documents: how many there are.
        batch: documents of a batch.
    """
    characters = "".join(chr(_FIRST + code) for code in range(vocabulary - _BYTES))
    BPETokenizer.train_characters([characters]).save(folder)
    shape = (documents, length - _AROUND)
    codes = torch.randint(len(characters), shape, generator=generator_for(0)).tolist()
    rows = [{"segments": [{"text": "".join(characters[code] for code in document)}]} for document in codes]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    configuration: dict[str, Any] = {
        "seed_everything": 0,
        "model": {
            "class_path": "multidiff.training.MaskedDiffusionModule",
            "init_args": {"tokenizers": {"text": {"plugin": "bpe", "folder": str(folder)}}},
        },
        "data": {
            "class_path": "multidiff.data.DocumentDataModule",
            "init_args": {
                "source": str(folder),
                "tokenizers": "${model.init_args.tokenizers}",
                "batch_size": batch,
                "max_eos_padding": {"text": 1},
                "max_seq_length": None,
            },
        },
        "trainer": {
            "max_epochs": -1,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "logger": False,
            "enable_checkpointing": False,
        },
    }
    path = folder / "training.yaml"
    path.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    return path
