"""`multidiff generate audio` as a script: see `--help`."""

import sys

from multidiff.cli.generate import main

if __name__ == "__main__":
    main(["audio", *sys.argv[1:]], prog="generate_audio.py")
