"""Memory that training steps free and ask for again, on a system whose C library is glibc."""

import platform
import subprocess
import sys

import pytest
from tiny import ROOT

from peftlab.run import heap

COUNT = """
import ctypes, resource, sys
from peftlab.run import heap

glibc = ctypes.CDLL("libc.so.6")
glibc.malloc.restype, glibc.malloc.argtypes, glibc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def step():
    blocks = [glibc.malloc(2**24) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 2**24)
    for block in blocks:
        glibc.free(block)

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

step(), step()
usual, before = pages(), resident()
with heap.kept():
    step()
    kept, inside = pages(), resident()
print(usual, kept, inside - before, resident() - before, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their own ways")
def test_pages_of_a_step_are_asked_for_once_and_given_back_at_the_end():
    ran = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, cwd=ROOT)
    usual, kept, inside, after, again = map(int, ran.stdout.split())
    pages = 8 * 2**24 // 4096
    assert usual > pages / 2 and again > pages / 2 and kept < pages / 100
    assert inside > pages / 2 and after < pages / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.kept():
        pass
