"""Devices for tests that write to them.

Root could replace the devices of the machine, so that a defect would damage it. Root gets copies.
"""

import os
import stat
from pathlib import Path

import pytest

_MINOR = {"null": 3, "full": 7}


def device(name: str, directory: Path) -> Path:
    """A device like /dev/null or /dev/full."""
    if os.geteuid():
        return Path("/dev") / name
    path = directory / name
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, _MINOR[name]))
        path.open("rb").close()
    except OSError as error:
        pytest.skip(f"no device can be created here: {error}")
    return path
