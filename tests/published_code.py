"""Other people's packages, run in a process of their own on small random weights.

They lie in the folder that DALLE_PEERS names, installed without their dependencies (`.ci/run` has the lines). Where it is
not set a test that needs them is skipped, but fails with DALLE_CI.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = os.environ.get("DALLE_PEERS", "")
needs_peers = pytest.mark.skipif(
    not PEERS and not os.environ.get("DALLE_CI"), reason="needs the published packages: see .ci/run"
)


def run_published_code(script: str, folder: Path) -> Path:
    """Run tests/peers/`script`.py, which writes checkpoints and what they compute to `folder`; return the folder."""
    path = Path(__file__).parent / "peers" / f"{script}.py"
    environment = os.environ | {"PYTHONPATH": PEERS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(path), str(folder)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder
