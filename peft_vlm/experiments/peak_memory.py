"""Peak memory of a piece of work, above what was in use when it began."""

import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the peak between `start` and `stop` in MB (2**20 bytes): on a GPU the allocator's, on Linux the
    process's.

    Freed memory is returned to the system first, so that what earlier work left in the allocator
    neither counts nor hides what this one needs.

    Args:
        device: Device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.baseline: float | None = None

    def start(self) -> None:
        """Begin: everything in use now is the baseline."""
        gc.collect()
        self.baseline = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.baseline = torch.cuda.memory_allocated(self.device) / 2**20
            return
        if sys.platform == "linux":
            try:
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                _CLEAR_REFS.write_text("5")  # resets VmHWM to the current resident size
            except (OSError, AttributeError):  # another C library, or a container that does not let a process reset it
                return
            self.baseline = _status_mb("VmRSS")

    def stop(self) -> float | None:
        """End: megabytes above the baseline; None where the system offers no measure."""
        if self.baseline is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.baseline
        return max(0.0, _status_mb("VmHWM") - self.baseline)


def _status_mb(key: str) -> float:
    """A line of /proc/self/status in MB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024
