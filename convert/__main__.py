"""``python -m llava_edge.convert CHECKPOINT -o BUNDLE``: the same as ``llava-edge convert``."""

import sys

from llava_edge.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
