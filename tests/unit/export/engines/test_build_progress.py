"""Builds that report progress, are interrupted, or keep a timing cache."""

import itertools
import subprocess
import sys
import threading

import pytest

from export.engines.builder import _read_cache, _write_cache
from serving.errors import InputError
from serving.util.progress import silent
from tests.support.engine_builds import (
    SLOWEST_S,
    after,
    built,
    graph_of,
)
from tests.support.paths import CHECKOUT

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT-RTX: make setup")


def test_progress_advances(tiny_bundle):
    steps: list[tuple[str, int, int]] = []

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        steps.append((step, done, total))

    built(graph_of(tiny_bundle, "text", "fp16"), progress=progress)
    phases = list(dict.fromkeys(step for step, _, _ in steps))
    assert len(phases) >= 2
    for phase in phases:
        name, _, what = phase.partition(": ")
        assert name == "text.fp16.onnx"
        assert what
        done = [d for step, d, _ in steps if step == phase]
        (total,) = {t for step, _, t in steps if step == phase}
        assert 1 <= done[0] <= done[-1] <= total
        # A finished phase may start again. Otherwise the count only increases.
        assert all(late > early or late == 1 for early, late in itertools.pairwise(done))
    assert max(total for _, _, total in steps) > 50  # more than start and end


def test_ctrl_c_ends_a_build(tiny_bundle):
    program = ["-m", "tests.support.interrupted_builds"]
    command = [sys.executable, "-X", "faulthandler", *program, str(tiny_bundle.path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_error_in_the_progress_callback_is_raised(tiny_bundle):
    def fail() -> None:
        raise BrokenPipeError("nobody reads this")

    with pytest.raises(BrokenPipeError, match="nobody reads this"):
        built(graph_of(tiny_bundle, "image", "fp16"), progress=after(3, fail))


def test_build_runs_in_another_thread(tiny_bundle):
    """No signal handler can be set in another thread."""
    made: list[bytes] = []
    graph = graph_of(tiny_bundle, "image", "fp16")
    thread = threading.Thread(target=lambda: made.append(built(graph)[0]))
    thread.start()
    thread.join(SLOWEST_S)
    assert made


no_ops = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")


@no_ops
@pytest.mark.parametrize("content", [None, b"", b"of something else entirely" * 10])
def test_timing_cache_is_written(config, tmp_path, content):
    """The cache is written whatever the file contained before."""
    file = tmp_path / "new" / "kernels.timing"
    if content is not None:
        file.parent.mkdir()
        file.write_bytes(content)
    cache = _read_cache(config, file)
    assert isinstance(cache, rtx.ITimingCache)
    _write_cache(cache, file, silent)
    written = file.read_bytes()
    assert written not in (b"", content)
    assert _read_cache(config, file) is not None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_no_timing_cache_is_written_without_a_file(config):
    assert _read_cache(config, None) is None
    _write_cache(None, None, silent)


@no_ops
def test_unwritable_timing_cache_is_reported(config, tmp_path):
    """The build does not fail, because its engine is complete."""
    (tmp_path / "file").write_text("no folder")
    file, said = tmp_path / "file" / "kernels.timing", list[str]()

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        said.append(step)

    _write_cache(_read_cache(config, file), file, progress)
    assert said == [
        f"the timing cache was not written: {file}: [Errno 17] File exists: '{file.parent}'"
    ]


def test_unreadable_timing_cache_is_rejected(config, tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); name another file"):
        _read_cache(config, tmp_path)
