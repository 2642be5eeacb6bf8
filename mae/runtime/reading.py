"""Reading files that others have made: regular files only, and no more than such a file can honestly hold.

A pipe would wait for a writer for ever, a device may have no end, and a small file may claim to be endless.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MIB, GIB = 1 << 20, 1 << 30

# What a file can honestly need, in bytes.
YAML = 64 << 10  # settings of a run have 5 KiB; reading YAML takes some 20 s per MiB
SETTINGS = 4 * MIB  # JSON: settings of a model or a processor; 20,000 names of classes take 1 MiB
METRICS = GIB  # metrics.csv: a million rows of 1,000 bytes
INDEX = GIB  # of shards: 16 million images at 64 bytes, half of them its name
NAMES = GIB  # lists of images: 16 million names of 64 bytes
TAR_HEADER = MIB // 4  # of one member of a tar file: long names, and extended attributes of 64 KiB each
DEVKIT = 64 * MIB  # ImageNet's, unpacked; it takes 3 MiB
WEIGHTS_HEADER = 16 * MIB  # of a safetensors file: 100,000 names and shapes, and a description with names of classes
PICKLE = 16 * MIB  # of a checkpoint of torch: everything but its tensors
RECORDED = 4 * GIB  # a run's .wandb file


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, unbuffered.

    Raises:
        OSError: There is none, or it is something else: a folder, pipe, socket or device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe waits for a writer
    except OSError as error:
        if error.errno != errno.ENXIO:  # of a socket
            raise
        raise OSError(errno.EINVAL, "it is a socket, not a file", str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb", buffering=0)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe or device, not a file", str(path))


def read_regular(path: str | Path, limit: int) -> bytes:
    """The bytes of a file.

    Args:
        limit: In bytes.

    Raises:
        OSError: As for `open_regular`, or the file is larger than the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, over the limit of {limit:,}", str(path))
        data = file.read(size)
        while len(data) < size and (more := file.read(size - len(data))):  # a read gives 2 GB at most
            data += more
        return data
