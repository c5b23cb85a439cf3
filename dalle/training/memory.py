"""Ask the C library to keep the memory that tensors free, instead of handing it back to the system every time.

Source: none in the papers; mallopt(3). A CPU training step frees and takes the same few large blocks again and
again; glibc gives each back at once, and the next one costs a page fault every 4 KiB: a fifth of a step of the
preset `laptop` (`benchmarks/train.py --variants` shows it).
"""

import ctypes
import logging
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
LARGEST_INT = 2**31 - 1
logger = logging.getLogger(__name__)


def keep_freed_memory() -> bool:
    """Set glibc's allocator of this process to reuse large blocks; False where there is no glibc.

    For a process whose purpose is training: what it took stays its own until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, 64 * 2**20))
    done = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in wanted]  # 1 each if it worked
    is_set = all(done)
    logger.debug("large blocks are %s", "kept for reuse" if is_set else "handed back as usual")
    return is_set
