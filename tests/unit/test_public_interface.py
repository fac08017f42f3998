"""The public names of `serving`."""

import subprocess
import sys

import pytest

import serving
from serving import errors
from tests.support.paths import CHECKOUT

OTHERS = {"ClipClient", "Credentials", "LocalClip", "ZeroShotClassifier"}


def test_public_names_exist_and_are_lazy():
    code = "import sys, serving; print('tritonclient' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    for name in serving.__all__:
        assert getattr(serving, name).__name__ == name
    assert serving.__all__ == sorted(serving.__all__)
    assert set(serving.__all__) <= set(dir(serving))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = serving.Nothing


def test_every_error_is_public():
    raised = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.ClipDeployError)
    }
    assert raised == set(serving.__all__) - OTHERS
