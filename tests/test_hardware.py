"""What the launcher asks of a CPU's memory."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no transparent huge pages")
def test_large_arrays_lie_in_a_heap_that_keeps_them_and_asks_for_huge_pages():
    script = r"""
import re
from lmjax.hardware import prepare_cpu
prepare_cpu()
import numpy as np
def place(address):
    for line in open("/proc/self/smaps"):
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) .*?(\S*)$", line):
            start, end, name = int(found[1], 16), int(found[2], 16), found[3]
        elif line.startswith("VmFlags:") and start <= address < end:
            return name, line.split()[1:]
array = np.ones(2**26, np.uint8)
address = array.__array_interface__["data"][0]
where, flags = place(address + array.size // 2)
assert where == "[heap]", where
assert "hg" in flags, flags
del array
again = np.ones(2**26, np.uint8)
assert again.__array_interface__["data"][0] == address  # what was freed is used again
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
