"""`multidiff generate image` as a script: see `--help`."""

import sys

from multidiff.cli.generate import main

if __name__ == "__main__":
    main(["image", *sys.argv[1:]], prog="generate_images.py")
