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
_FLAGS_END: Final = 40
"""Where the flags of a listed mapping, which follow two addresses, have ended in any case."""


def files_shared_by(own: str) -> list[str]:
    """Return the names, as the kernel has them, of the files that a process shares memory with.

    That takes no open descriptor. A list that had to be read has newlines, and nothing else, as three octal digits.

    Args:
        own: the process's directory, or a thread's, below `/proc`.
    """
    try:
        descriptor = os.open(f"{own}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return [os.fsdecode(name) for name in _named_by_kernel(descriptor)]
    except ProcessLookupError:  # it has ended, or is the kernel's own
        return []
    except OSError:  # the kernel does not know the question
        return [os.fsdecode(name) for name in _listed(read(f"{own}/maps"))]
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


def _listed(maps: bytes) -> Iterator[bytes]:
    for line in maps.splitlines():
        # Most are private, and not worth being taken apart.
        fields = line.split(maxsplit=5) if b"s " in line[:_FLAGS_END] else ()
        if len(fields) > 5:
            yield fields[5]
