"""The export commands as a user sees them: output, location of files, and exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.__main__ import app
from export.checkpoints.architectures import ARCHITECTURES, KNOWN_MODELS
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Manifest
from serving.cli.console import run
from serving.util.typed_json import from_json
from tests.support.paths import CHECKOUT


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process. Return exit code, standard output and error."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            run(app)
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def process(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "export", *map(str, args)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_exports_a_bundle_and_prints_json(tiny_checkpoint, tmp_path):
    """Runs in its own process: default output directory, and one JSON document on standard
    output."""
    done = process(tiny_checkpoint, "--precision", "fp32", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    made = Bundle.open(tmp_path / "artifacts" / "tiny-clip")
    assert document.keys() == {"path", "manifest"}
    assert document["path"] == "artifacts/tiny-clip"
    assert from_json(Manifest, document["manifest"]) == made.manifest
    assert all(v["passed"] for a in document["manifest"]["artifacts"] for v in a["verdicts"])
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert [p.name for p in (tmp_path / "artifacts").iterdir()] == ["tiny-clip"]


def test_verify_prints_a_table_of_verdicts(command, fp32_bundle):
    code, out, _ = command("verify", fp32_bundle.path)
    assert code == 0
    assert "image.fp32.onnx" in out
    assert "onnxruntime:fp32" in out
    assert "passed" in out
    assert "failed" not in out


def test_verify_prints_json(command, fp32_bundle):
    code, out, _ = command("verify", fp32_bundle.path, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["path"] == str(fp32_bundle.path)
    artifacts = document["manifest"]["artifacts"]
    assert {a["graph"] for a in artifacts} == {"image", "text"}
    assert all(a["verdicts"] for a in artifacts)


def test_verify_rejects_a_tampered_bundle(command, fp32_bundle, tmp_path):
    path = Path(shutil.copytree(fp32_bundle.path, tmp_path / "bundle"))
    with (path / "text.fp32.onnx").open("r+b") as file:
        file.seek(3000)
        file.write(b"tampered")
    code, out, err = command("verify", path)
    assert (code, out) == (2, "")
    assert "error:" in err
    assert "text.fp32.onnx is not the file that was exported" in err
    assert "Traceback" not in err


def test_verify_exits_with_1_if_a_graph_fails_the_gate(command, fp32_bundle, monkeypatch):
    """The numbers are shown, and scripts see exit code 1."""
    from serving.bundles import manifest

    for precision, tolerance in manifest.TOLERANCES.items():
        strict = replace(tolerance, min_cosine=1.1)
        monkeypatch.setitem(manifest.TOLERANCES, precision, strict)
    code, out, err = command("verify", fp32_bundle.path, "--json")
    assert code == 1
    verdicts = [v for a in json.loads(out)["manifest"]["artifacts"] for v in a["verdicts"]]
    assert not any(v["passed"] for v in verdicts)
    assert "failed the parity gate: image.fp32.onnx by onnxruntime:fp32" in err


def test_verify_rejects_a_directory_that_is_not_a_bundle(command, tmp_path):
    code, _, err = command("verify", tmp_path)
    assert code == 2
    assert "is not a bundle: it has no manifest.json" in re.sub(r"\s+", " ", err)


def test_list_names_models_and_architectures(command):
    code, out, _ = command("list")
    assert code == 0
    for model in KNOWN_MODELS:
        assert model.name in out
    assert "151 M" in out
    assert "openaipublic.azureedge.net" in out
    for name in ARCHITECTURES:
        assert f"random:{name}" in re.sub(r"\s", "", out)


def test_list_prints_json(command):
    code, out, _ = command("list", "--json")
    assert code == 0
    document = json.loads(out)
    assert {m["name"] for m in document["models"]} == {m.name for m in KNOWN_MODELS}
    assert {m["architecture"] for m in document["models"]} <= document["architectures"].keys()
    assert document["architectures"]["ViT-B-32"]["image"]["patch_size"] == 32


def test_unknown_checkpoint_is_reported_without_traceback(tmp_path):
    """Runs in its own process: no traceback, exit code 2, and no files written."""
    done = process("ViT-B-33", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: unknown checkpoint 'ViT-B-33'" in done.stderr
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_brackets_in_an_error_are_shown(command, tmp_path):
    """rich would interpret them as markup."""
    code, _, err = command("bundle", tmp_path / "[bold]x[/bold].pt")
    assert code == 2
    assert "[bold]x[/bold].pt" in err


def test_directory_with_other_files_is_not_overwritten(command, tiny_checkpoint, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = command(tiny_checkpoint, "--output", tmp_path, "--precision", "fp32")
    assert code == 2
    assert "holds other files" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["x", "--activation", "relu"], "'relu' is not one of"),
        (["x", "--vocabulary", "/no/such/file"], "/no/such/file"),
        (["x", "--no-such-option"], "No such option"),
        (["verify"], "Missing argument"),
    ],
)
def test_usage_errors_are_reported(command, args, shown):
    code, _, err = command(*args)
    assert code == 2
    assert shown in re.sub(r"[\s│]+", " ", err)


def test_help_names_every_command(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in ("bundle", "list", "verify", "CHECKPOINT"):
        assert name in out
