"""Tests of the wheel in empty environments (`make package`). They need the package index.

One environment has `clip-deploy[embedded]`, and assembles and serves a bundle made elsewhere.
Another has only the wheel and sends requests to the server. Both run outside the checkout.
"""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import CHECKOUT

PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")

USER_SCRIPT = """
import numpy as np
from serving import ClipClient, ImageError, LocalClip, ZeroShotClassifier

def search(clip: ClipClient | LocalClip, files: list[str], text: str) -> list[float]:
    cosines = clip.embed_images(files) @ clip.embed_texts([text])[0]
    return [float(cosine) for cosine in cosines]

try:
    with LocalClip("bundle", "openvino:int8") as clip:
        print(search(clip, ["cat.jpg"], "a cat"))
        probabilities = ZeroShotClassifier(clip, ["cat", "dog"]).classify(["cat.jpg"])
        print(probabilities.argmax(axis=1).astype(np.int64).tolist())
except ImageError as error:
    print(error)
with ClipClient("grpc://localhost:8001") as client:
    print(client.classify(["cat.jpg"], ["cat", "dog"]).shape)
"""


def run(program: Path, *arguments, cwd: Path, check=True):
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Wheel built from a copy of the sources, so that the checkout stays clean."""
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if name.startswith(("serving/", "export/", "model_repository/", "training/")) or (
            "/" not in name
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((CHECKOUT / name).read_bytes())
    pip = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, source]
    run(Path(sys.executable), *pip, cwd=target)
    (found,) = target.glob("*.whl")
    return found


def environment(path: Path, requirement: str) -> Path:
    """Create a virtual environment with only `requirement`. Return its `bin` directory."""
    run(Path(sys.executable), "-m", "venv", path, cwd=path.parent)
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    constraints = ("-c", CHECKOUT / "constraints.txt")
    run(path / "bin" / "python", *pip, *constraints, requirement, cwd=path.parent)
    return path / "bin"


@pytest.fixture(scope="module")
def embedded(wheel, tmp_path_factory) -> Path:
    """`bin` directory of the environment of the server."""
    return environment(tmp_path_factory.mktemp("serving") / "venv", f"{wheel}[embedded]")


@pytest.fixture(scope="module")
def client(wheel, tmp_path_factory) -> Path:
    """`bin` directory of the environment of the client."""
    return environment(tmp_path_factory.mktemp("client") / "venv", str(wheel))


def test_wheel_contains_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [p for package in ("serving", "export") for p in (CHECKOUT / package).rglob("*.py")]
    assert {p.relative_to(CHECKOUT).as_posix() for p in sources} <= names
    repository = CHECKOUT / "model_repository"
    models = (*repository.rglob("config.pbtxt"), *repository.rglob("model.py"))
    expected = {f"serving/{p.relative_to(CHECKOUT).as_posix()}" for p in models}
    assert len(expected) > 10
    assert expected <= names
    assert {"serving/py.typed", "export/py.typed", "export/engines/in_container.sh"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"serving", "export"}


def test_installed_command_assembles_and_serves_a_bundle(
    embedded, client, tiny_bundle, pictures, tmp_path
):
    program = embedded / "clip-deploy"
    repository = tmp_path / "models"
    made = run(
        program, "assemble", tiny_bundle.path, "--output", repository, "--json", cwd=tmp_path
    )
    assert "clip_zero_shot" in json.loads(made.stdout)["models"]
    up = [str(program), "up", str(repository), *PORTS, "--json"]
    with subprocess.Popen(up, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            urls = json.loads(server.stdout.readline())
            for url in (urls["http"], urls["grpc"]):
                labels = ("--label", "a cat", "--label", "a dog", "--json")
                asked = run(
                    client / "clip-deploy",
                    "classify",
                    pictures,
                    *labels,
                    "--url",
                    url,
                    cwd=tmp_path,
                )
                rows = json.loads(asked.stdout)
                assert len(rows) == len(list(pictures.iterdir()))
            output = tmp_path / "embeddings.npz"
            run(
                *(client / "clip-deploy", "embed", pictures, "--url", url, "--output", output),
                cwd=tmp_path,
            )
            assert np.load(output)["embeddings"].shape == (
                len(rows),
                tiny_bundle.manifest.embed_dim,
            )
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0


@pytest.mark.parametrize(
    "found", ["does not exist", "is empty", "contains other files", "is a file"]
)
def test_up_rejects_a_directory_without_models(embedded, tmp_path, found):
    repository = tmp_path / "models"
    if found == "is a file":
        repository.touch()
    elif found != "does not exist":
        repository.mkdir()
        if found == "contains other files":
            (repository / "notes.txt").touch()
    done = run(embedded / "clip-deploy", "up", repository, *PORTS, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"{repository} {found}; expected a model repository" in done.stderr.replace("\n", " ")
    assert f"clip-deploy assemble BUNDLE --output {repository}" in done.stderr.replace("\n", " ")


def test_client_needs_no_runtime(client, tiny_bundle, tmp_path):
    """Commands that need a missing package name it; the others work."""
    listed = run(client / "clip-deploy", "list", "--json", cwd=tmp_path, check=False)
    assert listed.returncode == 2
    assert "pip install 'clip-deploy[export]'" in listed.stderr
    done = run(client / "clip-deploy", "up", tmp_path, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = run(
        *(client / "clip-deploy", "embed", "--text", "a cat", "--bundle", tiny_bundle.path),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "onnxruntime is not installed" in done.stderr


def test_user_script_passes_mypy_strict(embedded, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    options = ("--strict", "--config-file=", f"--python-executable={embedded / 'python'}")
    done = run(Path(sys.executable), "-m", "mypy", *options, script, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
