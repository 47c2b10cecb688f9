"""The server's threads keep little of what they free; seen in a process of its own, begun as the command is."""

import ctypes
import os
import subprocess
import sys

import pytest

from runtime.machine.freed_memory import give_back_freed
from serve.process.allocator import SETTINGS, VARIABLE, tuned
from tests.support.server_process import resident_bytes

NUM_THREADS = 8
MAX_KEPT_BYTES = 16_000
"""A thread's share, with its cache's own table and what heaps round up; without the limit 200 KB."""
PROBE = f"""
import ctypes, os, sys, threading, types
import headrace

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h d u f used free top".split()]

libc.mallinfo2.restype = Mallinfo

def serve(argv):
    begun, ended = threading.Barrier({NUM_THREADS} + 1), threading.Barrier({NUM_THREADS} + 1)
    def work():
        begun.wait()
        for size in range(24, 1033, 16):
            pieces = [libc.malloc(size) for _ in range(7)]
            for piece in pieces:
                libc.free(piece)
        ended.wait()
        ended.wait()
    threads = [threading.Thread(target=work) for _ in range({NUM_THREADS})]
    for thread in threads:
        thread.start()
    before = libc.mallinfo2().used
    begun.wait()
    ended.wait()
    print(argv, libc.mallinfo2().used - before)
    ended.wait()
    return 0

sys.modules["probe"] = types.ModuleType("probe")
sys.modules["probe"].main = serve
headrace.VERBS["serve"] = ("probe", "")
sys.exit(headrace.main())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 or newer tells what threads keep")
def test_a_thread_of_the_server_keeps_little_of_what_it_frees() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    command = [sys.executable, "-c", PROBE, "serve", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    arguments, _, kept = done.stdout.rpartition(" ")
    assert arguments == "['--port', '0']"
    assert int(kept) < NUM_THREADS * MAX_KEPT_BYTES


def test_what_the_user_has_set_stays() -> None:
    assert tuned({"A": "b"}) == {"A": "b", VARIABLE: SETTINGS}
    assert tuned({VARIABLE: "glibc.cpu.x86_shstk=off"}) == {VARIABLE: f"glibc.cpu.x86_shstk=off:{SETTINGS}"}
    assert tuned({VARIABLE: SETTINGS}) is None, "it would begin again without end"
    assert tuned({VARIABLE: "glibc.malloc.tcache_count=3"}) is None
    assert tuned({"MALLOC_ARENA_MAX": "8"}) is None


def test_what_a_closed_model_leaves_in_the_heap_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("another C library than glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    pieces = [libc.malloc(2**16) for _ in range(2048)]  # below the size that is mapped by itself
    for piece in pieces:
        ctypes.memset(piece, 1, 2**16)
    for piece in pieces[:-1]:  # the last one is above all others: the heap cannot just become shorter
        libc.free(piece)
    held = resident_bytes()
    give_back_freed()
    assert held - resident_bytes() > 2**26
    libc.free(pieces[-1])
