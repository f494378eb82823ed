"""`multidiff generate caption` as a script: see `--help`."""

import sys

from multidiff.cli.generate import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]], prog="generate_captions.py")
