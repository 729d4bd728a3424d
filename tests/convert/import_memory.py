"""What the memory and speed test runs: imports a model, and says how far its memory grew.

Arguments: a folder of a tiny model, which warms up what stays; the folder of the large one; where
the workdirs are made. Prints the growth of the peak and of what is held at the end, in bytes, and
the seconds of the import and of reading the file alone.
"""

import sys
import time
from pathlib import Path

import numpy as np

from lmjax.convert.imports import import_folder


def memory(field):
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def main():
    tiny, large, out = map(Path, sys.argv[1:])
    import_folder(tiny, out / "tiny")
    before, peak = memory("VmRSS"), memory("VmHWM")
    began = time.monotonic()
    import_folder(large, out / "large")
    seconds = time.monotonic() - began
    growth = memory("VmHWM") - max(before, peak)
    began = time.monotonic()
    block = np.empty(2**24, np.uint8)
    for file in large.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block.data):
                pass
    print(growth, f"{seconds:.3f}", f"{time.monotonic() - began:.3f}")


if __name__ == "__main__":
    main()
