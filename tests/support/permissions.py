"""Make permission bits apply to tests that run as root."""

import os
import shutil

import pytest


def as_user() -> list[str]:
    """Command prefix under which permission bits apply, to root too."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("runs as root, and there is no program setpriv")
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]
