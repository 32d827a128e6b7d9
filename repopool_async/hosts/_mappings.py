"""Which files a process shares memory with: asked of the kernel one by one where it can be, else read as text.

A large program has thousands of mappings, few of them shared with a file. Linux 6.11 names only those (`PROCMAP_QUERY`
in `linux/fs.h`); an older one has to be let write all of them down. Synchronous; for one thread hop.
"""

import array
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from repopool_async.hosts._proc import read

_QUERY: Final = struct.Struct("=9Q4I2Q")
"""`struct procmap_query`."""
_PROCMAP_QUERY: Final = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
_SHARED: Final = 0x08
_THIS_OR_NEXT: Final = 0x10
_OF_A_FILE: Final = 0x20
_NAME_BYTES: Final = 4096


def shares_memory_with(own: str, root: str) -> bool:
    """Return whether a process shares memory with a file below a directory, which needs no open descriptor.

    Args:
        own: the process's directory, or a thread's, below `/proc`.
    """
    try:
        descriptor = os.open(f"{own}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        prefix = os.fsencode(root) + b"/"
        return any(name.startswith(prefix) for name in _named_by_kernel(descriptor))
    except ProcessLookupError:  # it has ended, or is the kernel's own
        return False
    except OSError:  # the kernel does not know the question
        return _is_among(read(f"{own}/maps"), root)
    finally:
        os.close(descriptor)


def _named_by_kernel(descriptor: int) -> Iterator[bytes]:
    """Yield the names of the files that memory is shared with.

    Raises:
        OSError: the kernel cannot be asked, or the process is gone.
    """
    name = array.array("B", bytes(_NAME_BYTES))
    address, flags = 0, _SHARED | _THIS_OR_NEXT | _OF_A_FILE
    while True:
        asked = (_QUERY.size, flags, address, *(0,) * 8, _NAME_BYTES, 0, name.buffer_info()[0], 0)
        query = bytearray(_QUERY.pack(*asked))
        try:
            fcntl.ioctl(descriptor, _PROCMAP_QUERY, query)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        told = _QUERY.unpack(query)
        address = told[4]
        yield name.tobytes()[: told[11]].rstrip(b"\0")


def _is_among(maps: bytes, root: str) -> bool:
    # The kernel writes newlines, and nothing else, as three octal digits.
    prefix = os.fsencode(root).replace(b"\n", rb"\012") + b"/"
    return prefix in maps and any(
        fields[1][3:4] == b"s" and fields[5].startswith(prefix)
        for line in maps.splitlines()
        if len(fields := line.split(maxsplit=5)) > 5
    )
