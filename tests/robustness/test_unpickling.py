"""Tests that no input file can run code when it is read."""

import ast
import importlib.util
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from serving.errors import InputError
from serving.search.build import build as build_index
from serving.search.index import SearchIndex
from serving.tasks.zero_shot import ZeroShotClassifier
from tests.support.paths import CHECKOUT

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'", allow_module_level=True)

PACKAGES = ("serving", "model_repository", "export", "training", "benchmarks", "tests")


TREE = [path for package in PACKAGES for path in sorted((CHECKOUT / package).rglob("*.py"))]


NEVER = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cPickle.load",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "pandas.read_pickle",
    "pd.read_pickle",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "eval",
    "exec",
}
"""Functions that run code from their input."""


def dotted(node):
    """Dotted name of a call's function, such as `a.b.c`; empty for other expressions."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_loads(source):
    """Calls and imports in a module that may run code from their input, as `line: name`."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve"):
            found.append(f"{node.lineno}: names imported from {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func).replace("numpy.", "np.")
        given = {
            keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else "?"
            for keyword in node.keywords
        }
        if (
            name in NEVER
            or (name == "torch.load" and given.get("weights_only") is not True)
            or given.get("allow_pickle", False) is not False
            or given.get("trust_remote_code", False) is not False
            or (given.get("weights_only", True) is not True)
        ):
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=x)",
        "joblib.load(path)",
        "Model.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_unsafe_loads_finds_every_kind_of_call(line):
    assert unsafe_loads(line)


def test_no_module_unpickles(figure):
    assert len(TREE) > 150
    found = {
        f"{path.relative_to(CHECKOUT)}:{problem}"
        for path in TREE
        for problem in unsafe_loads(path.read_text(encoding="utf-8"))
    }
    assert found == set()
    figure("unpickling", f"0 calls in {len(TREE)} modules")


class Bomb:
    """Object that creates a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def malicious_npy(victim):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(victim)], dtype=object))
    return buffer.getvalue()


def test_bomb_works_with_allow_pickle(tmp_path):
    victim = tmp_path / "victim"
    load = "import sys, numpy; numpy.load(sys.argv[1], allow_pickle=True)"
    (tmp_path / "bomb.npy").write_bytes(malicious_npy(victim))
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "bomb.npy")], check=True)
    assert victim.exists()


def test_search_index_does_not_unpickle(tiny_bundle, pictures, tmp_path):
    from serving.clients.local import LocalClip
    from serving.util.files import sha256_of

    pytest.importorskip("faiss", reason="no faiss: pip install 'clip-deploy[search]'")
    index, victim = tmp_path / "index", tmp_path / "victim"
    with LocalClip(tiny_bundle.path) as clip:
        build_index(pictures, index, clip)
    manifest = json.loads((index / "manifest.json").read_text())
    file = manifest["embeddings"]
    (index / file["name"]).write_bytes(malicious_npy(victim))
    # An attacker who writes the file can write the manifest too, so the checksums match.
    file |= {"sha256": sha256_of(index / file["name"])}
    file |= {"bytes": (index / file["name"]).stat().st_size}
    (index / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="holds no embeddings"):
        SearchIndex.open(index)
    assert not victim.exists()


def test_saved_classifier_does_not_unpickle(tiny_bundle, tmp_path):
    from serving.clients.local import LocalClip

    file, victim = tmp_path / "labels.npz", tmp_path / "victim"
    with file.open("wb") as stream:
        np.savez(stream, facts=np.array([Bomb(victim)], dtype=object), embeddings=np.zeros(1))
    with (
        LocalClip(tiny_bundle.path) as clip,
        pytest.raises(InputError, match="is not a saved classifier"),
    ):
        ZeroShotClassifier.load(file, clip)
    assert not victim.exists()
