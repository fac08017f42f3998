"""Bulk jobs and their outputs."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.bulk.job import bulk_embed

RUNNER = "onnxruntime:fp32"


def run(source, out, bundle, **options):
    return bulk_embed(str(source), out, bundle.path, **{"runner": RUNNER, **options})


def rows_of(out) -> list[dict]:
    names = sorted(path for path in Path(out).glob("shard-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in names]).to_pylist()


def embeddings_of(rows) -> np.ndarray:
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    assert [row["error"] for row in rows] == [None] * len(rows)
    return np.array([row["embedding"] for row in rows], np.float32)


def assert_complete(out, root: Path, local) -> None:
    """Embed each image below `root` once, in the order of the names, in this process."""
    files = sorted(root.rglob("*.jpg"))
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [file.relative_to(root).as_posix() for file in files]
    np.testing.assert_allclose(embeddings_of(rows), local.embed_images(files), atol=1e-6)
    left = {path.name for path in Path(out).iterdir() if not path.name.startswith("shard-")}
    assert left <= {"manifest.json", "shards.jsonl", ".lock"}


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "serving", "bulk", *map(str, arguments)]
