"""Contaminations by processes that keep what they hold where a look at a process does not find it at once."""

import os
from pathlib import Path

from tests.contamination.kit import Scene, vector

_THREADS = """
import ctypes, threading
libc = ctypes.CDLL(None, use_errno=True)
CLONE_FS, CLONE_FILES, SYS_exit = 0x200, 0x400, {exit}
def unshare(flags):
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), 'unshare')
def late(descriptor):
    ready()
    told()
    os.write(descriptor, b'late')
    done()
def in_thread(act):
    thread = threading.Thread(target=act)
    thread.start()
    return thread
"""


def _leave(scene: Scene, script: str) -> None:
    number = {"x86_64": 60}.get(os.uname().machine, 93)
    scene.leave(_THREADS.format(exit=number) + script, is_scrubbed=True, cwd=Path("/"))


@vector("processes")
def thread_with_files_of_its_own(scene: Scene) -> None:
    _leave(scene, f"""
def act():
    unshare(CLONE_FILES)
    late(os.open({str(scene.tree / "README.md")!r}, os.O_WRONLY))
in_thread(act).join()
""")  # fmt: skip


@vector("processes")
def thread_with_a_directory_of_its_own(scene: Scene) -> None:
    _leave(scene, f"""
def act():
    unshare(CLONE_FS)
    os.chdir({str(scene.tree / "src")!r})
    ready()
    told()
    open('late.txt', 'w').write('late')
    done()
in_thread(act).join()
""")  # fmt: skip


@vector("processes")
def threads_whose_first_one_has_ended(scene: Scene) -> None:
    _leave(scene, f"""
descriptor = os.open({str(scene.tree / "README.md")!r}, os.O_WRONLY)
def act():
    while not open(f'/proc/self/stat').read().rpartition(')')[2].split()[0] == 'Z':
        time.sleep(0.002)
    late(descriptor)
in_thread(act)
libc.syscall(SYS_exit, 0)
""")  # fmt: skip


@vector("processes")
def descriptor_on_its_way_through_a_socket(scene: Scene) -> None:
    _leave(scene, f"""
one, other = socket.socketpair()
descriptor = os.open({str(scene.tree / "README.md")!r}, os.O_WRONLY)
socket.send_fds(one, [b'x'], [descriptor])
os.close(descriptor)
ready()
told()
os.write(socket.recv_fds(other, 1, 1)[1][0], b'late')
done()
""")  # fmt: skip


@vector("processes")
def descriptor_on_its_way_through_a_socket_on_its_way(scene: Scene) -> None:
    _leave(scene, f"""
one, other = socket.socketpair()
outer, inner = socket.socketpair()
descriptor = os.open({str(scene.tree / "src")!r}, os.O_RDONLY)
socket.send_fds(one, [b'x'], [descriptor])
socket.send_fds(outer, [b'x'], [other.fileno()])
os.close(descriptor)
other.close()
ready()
told()
other = socket.socket(fileno=socket.recv_fds(inner, 1, 1)[1][0])
directory = socket.recv_fds(other, 1, 1)[1][0]
os.close(os.open('late.txt', os.O_CREAT | os.O_WRONLY, dir_fd=directory))
done()
""")  # fmt: skip


@vector("processes")
def file_known_to_an_io_uring_only(scene: Scene) -> None:
    """A file registered with a ring needs no descriptor to be written."""
    _leave(scene, f"""
import struct
def call(*arguments):
    value = libc.syscall(*arguments)
    if value < 0:
        raise OSError(ctypes.get_errno(), 'io_uring')
    return value
SETUP, ENTER, REGISTER, REGISTER_FILES, WRITE, FIXED = 425, 426, 427, 2, 23, 1
parameters = (ctypes.c_uint * 30)()
ring = call(SETUP, 1, ctypes.byref(parameters))
descriptor = os.open({str(scene.tree / "README.md")!r}, os.O_WRONLY)
call(REGISTER, ring, REGISTER_FILES, (ctypes.c_int * 1)(descriptor), 1)
os.close(descriptor)
ready()
told()
queue, entries = mmap.mmap(ring, 4096, offset=0), mmap.mmap(ring, 4096, offset=0x10000000)
text = ctypes.create_string_buffer(b'late')
entries[:48] = struct.pack('<BBHiQQIIQQ', WRITE, FIXED, 0, 0, 0, ctypes.addressof(text), 4, 0, 0, 0)
struct.pack_into('<I', queue, parameters[16], 0)
struct.pack_into('<I', queue, parameters[11], struct.unpack_from('<I', queue, parameters[11])[0] + 1)
call(ENTER, ring, 1, 1, 1, None, 0)
done()
""")  # fmt: skip
