"""Write a data folder of plain texts: the first part of each file to train on, the rest for validation."""

import argparse
import json
from pathlib import Path

from multidiff import files

_CHARACTERS = 2**17  # of a document; training splits it further


def main() -> None:
    """Write `metadata.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", help="text files in UTF-8")
    parser.add_argument("--output", type=Path, default=Path("runs/text/data"), help="the folder to write")
    parser.add_argument("--validation", type=float, default=0.1, help="the share of each file's end for validation")
    arguments = parser.parse_args()
    if not 0 < arguments.validation < 1:
        raise SystemExit(f"prepare_text.py: --validation must be between 0 and 1, not {arguments.validation}")
    lines = []
    for path in arguments.texts:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"prepare_text.py: {path} cannot be read as UTF-8 ({files.first_line(error)})") from None
        edge = int(len(text) * (1 - arguments.validation))
        for split, part in (("train", text[:edge]), ("validation", text[edge:])):
            for start in range(0, len(part), _CHARACTERS):
                lines.append({"split": split, "segments": [{"text": part[start : start + _CHARACTERS]}]})
    if not lines:
        raise SystemExit("prepare_text.py: the texts are empty")
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_bytes(arguments.output / "metadata.jsonl", written.encode())
    print(arguments.output)


if __name__ == "__main__":
    main()
