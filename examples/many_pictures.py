"""Ask about every picture of a folder, one chat each, and tell the memory of the process as it goes.

python examples/many_pictures.py FOLDER [MODEL]
"""

import sys
from pathlib import Path

import llava_edge
from llava_edge.bench.speed.cold import peak_memory_bytes

folder, name = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "nano"
with llava_edge.load(name) as model:
    for number, picture in enumerate(sorted(folder.glob("*.jpg")), 1):
        with model.chat() as chat:
            chat.ask("What is in this picture?", images=[picture], max_tokens=4)
        if number % 100 == 0:
            print(f"{number} pictures, at most {peak_memory_bytes() / 1e6:.0f} MB")  # noqa: T201
