"""What this machine is, found without loading torch."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .catalog.gpus import GPUS

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where Linux tells of memory, and of the limits that a container has."""


@dataclass(frozen=True)
class Machine:
    device: str
    """`cuda` or `cpu`."""
    name: str
    gpu: str | None
    """The GPU's key in the catalogue; None without a GPU, and for one that the catalogue lacks."""
    cores: int
    memory_bytes: int | None
    """Size of the main memory, or what a container may take of it; None where the system does not say."""
    bf16: bool = False
    """True for a CPU with instructions that multiply bf16 numbers."""
    gpu_share: float = 1.0
    """How much of the GPU's memory there is to be had."""


def is_shared() -> bool:
    """Whether this is a ZeroGPU Space: a call that asks for the GPU has it for a while, in a process forked for it."""
    return bool(os.environ.get("SPACES_ZERO_GPU"))


@lru_cache(maxsize=1)
def here() -> Machine:
    """This machine; asked once for each process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = None
    with suppress(AttributeError, ValueError, OSError):  # not every system says
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = min([memory, *(limit for limit, _ in _limits())])
    if is_shared():
        return Machine("cuda", "NVIDIA RTX PRO 6000 (ZeroGPU)", "rtx-pro-6000", cores, memory, gpu_share=0.5)
    if gpu := _nvidia():
        return Machine("cuda", *gpu, cores, memory)
    processor = _cpuinfo("model name") or platform.processor() or platform.machine()
    return Machine("cpu", f"{cores} cores of {processor}", None, cores, memory, _multiplies_bf16())


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take, in its container too; None where the system does not say.

    What this process has freed but its allocator holds back is given to the system first, and so counts as free.
    """
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError, ValueError, StopIteration):
        lines = (PROC / "meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return max(0, min([free, *(limit - used for limit, used in _limits())]))
    return None


def mapped_files() -> int:
    """Bytes of files that lie in this process's memory and can be read again, which `free_memory` counts as free.

    A model whose numbers are used as its file has them is among them. 0 where the system does not say.
    """
    with suppress(OSError, ValueError, StopIteration):
        lines = (PROC / "self" / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))
    return 0


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes used of it) of each control group that this process is in, without files that can be read again."""
    names = {
        "": (GROUPS, "memory.max", "memory.current", "inactive_file"),
        "memory": (GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    with suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            for root, most, used, files in (names[kind] for kind in kinds.split(",") if kind in names):
                inside = root / path.strip("/")
                for group in (inside, *(folder for folder in inside.parents if folder.is_relative_to(root))):
                    with suppress(OSError, ValueError):  # `max` is no limit
                        limit, taken = int((group / most).read_text()), int((group / used).read_text())
                        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                        yield limit, taken - int(stat.get(files, 0))


def give_back() -> None:
    """Returns to the system what the heap of this process holds and does not use: after a run, some hundreds of megabytes.

    glibc gives back by itself only what lies at the heap's end. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def hold_little() -> None:
    """Has this process, which serves for weeks, keep little that it does not use. To be called before it computes anything.

    What oneDNN has compiled for a batch's shape takes megabytes, and it would keep a thousand of them. glibc would give each
    thread a heap of its own, of whose end nothing goes back to the system, and take ever larger blocks from there.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # as malloc.h numbers them
        mallopt(mmap_threshold, 2**22)
        mallopt(trim_threshold, 2**26)
        mallopt(arena_max, 1)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that a measurement depends on."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def _nvidia() -> tuple[str, str | None] | None:
    """Name of the first NVIDIA GPU, and its key in the catalogue; None where they are hidden from this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi"):
        return None
    try:
        ask = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        line = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        name, mib = line.rsplit(",", 1)
        return name.strip(), _catalogue_key(name, int(mib) * 2**20)
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None


def _catalogue_key(name: str, total: int) -> str | None:
    """The longest key of the catalogue whose words are all in `name` and whose memory differs by less than 15%."""
    words = set(name.lower().replace("-", " ").split())
    near = [
        key
        for key, gpu in GPUS.items()
        if words.issuperset(part for part in key.split("-") if not part.endswith("gb"))
        and abs(gpu.memory_bytes - total) < 0.15 * total
    ]
    return max(near, key=len, default=None)


def _multiplies_bf16() -> bool:
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpuinfo("flags").split())


def _cpuinfo(name: str) -> str:
    """What /proc/cpuinfo says of the first processor under that name; empty where there is no such file or name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
