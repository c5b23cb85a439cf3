"""The allocator setting, in a process of its own: it cannot be taken back."""

import subprocess
import sys

import pytest

# 64 MiB taken and freed, each time 16,384 pages of 4 KiB unless a block is kept; it takes some rounds until the
# allocator has one that fits.
TAKE_AND_FREE = """
import resource, sys
import torch
from dalle.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory())
torch.set_num_threads(1)
for _ in range(40):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_are_used_again_without_page_faults() -> None:
    printed = {
        name: subprocess.run(
            [sys.executable, "-c", TAKE_AND_FREE, name], check=True, capture_output=True, text=True
        ).stdout.split()
        for name in ("kept", "as usual")
    }
    assert printed["kept"][0] == "True"
    assert int(printed["kept"][1]) < 1_000
    assert (
        int(printed["as usual"][0]) > 2_000
    )  # so that the setting was needed; huge pages would make it fewer
