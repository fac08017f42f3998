"""Fixtures with a server for the security tests."""

import pytest

from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.requests import ANY


@pytest.fixture(scope="module")
def repository(fp32_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("security") / "repository"
    assemble(fp32_bundle, path, runner="onnxruntime:fp32", max_batch_size=8)
    return path


@pytest.fixture(scope="module")
def server(repository):
    with pytest.MonkeyPatch.context() as patch:
        # With this variable, Triton would by default open a Vertex AI port on all addresses.
        patch.setenv("AIP_MODE", "PREDICTION")
        with TritonServer(repository, **ANY, log=repository.with_suffix(".log")) as running:
            yield running
