"""Images in Parquet files: a column of encoded bytes, or of the structs of Hugging Face."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from serving.errors import InputError

_IMAGE_COLUMNS = ("image", "bytes")
_ROWS_AT_ONCE = 16
"""Number of rows read at a time, which bounds memory if images are large."""
_READ_BUFFER = 1 << 20
"""Buffer size in bytes. Without a buffer, pyarrow reads a whole column of a row group at once."""


def survey(
    paths: Iterable[Path], image_column: str | None, path_column: str | None
) -> tuple[str, int]:
    """Return the name of the image column, and the number of rows of all readable files.

    Raises:
        InputError: no file can be read, or the first readable file lacks a column.
    """
    column, rows, path = None, 0, Path()
    for path in paths:
        if (file := _opened(path)) is None:
            continue
        with file:
            rows += file.metadata.num_rows
            if column is None:
                column = _image_column(file.schema_arrow, image_column, str(path))
                names = file.schema_arrow.names
                if path_column is not None and path_column not in names:
                    raise InputError(
                        f"{path} has no column {path_column!r}, only {', '.join(names)}"
                    )
    if column is None:
        raise InputError(
            f"no Parquet file can be read (the last one is {path})",
            advice="copy or download the files again",
        )
    return column, rows


def row_group_runs(path: Path, size: int) -> list[tuple[int, int]] | None:
    """Group consecutive row groups into runs of at most `size` rows, if no row group is larger.

    Returns:
        The first row group of each run and one past its last, or None if the file is unreadable.
    """
    if (file := _opened(path)) is None:
        return None
    with file:
        sizes = _sizes(file)
    runs, start, rows = [], 0, 0
    for index, count in enumerate(sizes):
        if rows and rows + count > size:
            runs.append((start, index))
            start, rows = index, 0
        rows += count
    return [*runs, (start, len(sizes))]


def read_rows(
    path: Path,
    shown: str,
    image_column: str,
    path_column: str | None,
    row_groups: tuple[int, int] | None,
) -> Iterator[tuple[str, bytes | InputError]]:
    """Yield the name of each row with its image, or with an error if it cannot be read.

    The name of a row is its value in `path_column`, else the `path` of the struct, else
    `shown#row`. The rows of a damaged row group are read up to the damage.

    Args:
        path: the Parquet file.
        shown: name of the file in errors and in names of rows.
        image_column: column of the images.
        path_column: column of the names.
        row_groups: first row group to read and one past the last; None: all.
    """
    import pyarrow as pa

    try:
        with _open(path) as file:
            _image_column(file.schema_arrow, image_column, shown)
            sizes = _sizes(file)
            for group in range(*(row_groups or (0, len(sizes)))):
                row, stop = sum(sizes[:group]), sum(sizes[: group + 1])
                try:
                    for record in _records(file, group, image_column, path_column):
                        yield _named_image(record, image_column, path_column, f"{shown}#{row}")
                        row += 1
                except (OSError, pa.ArrowException) as error:
                    reason = InputError(f"row group {group} of {shown} is damaged: {error}")
                    yield from ((f"{shown}#{index}", reason) for index in range(row, stop))
    except (OSError, pa.ArrowException, InputError) as error:
        yield shown, InputError(f"cannot be read: {error}")


def _records(
    file: Any, group: int, image_column: str, path_column: str | None
) -> Iterator[dict[str, Any]]:
    columns = [column for column in (image_column, path_column) if column]
    for batch in file.iter_batches(_ROWS_AT_ONCE, [group], columns):
        yield from batch.to_pylist()


def _named_image(
    record: dict[str, Any], image_column: str, path_column: str | None, place: str
) -> tuple[str, bytes | InputError]:
    image = record[image_column]
    name = record.get(path_column) if path_column else None
    if isinstance(image, dict):
        image, name = image["bytes"], name or image.get("path")
    if image is None:
        image = InputError("no image: the column is null")
    return str(name or place), image


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    # pyarrow takes only paths in UTF-8; that of a descriptor is ASCII.
    with path.open("rb") as file:
        source = f"/proc/self/fd/{file.fileno()}"
        return pq.ParquetFile(source, buffer_size=_READ_BUFFER, pre_buffer=False)


def _opened(path: Path) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`; return None if the file is unreadable."""
    import pyarrow as pa

    try:
        return _open(path)
    except (OSError, pa.ArrowException):
        return None


def _sizes(file: Any) -> list[int]:
    return [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]


def _image_column(schema: Any, wanted: str | None, shown: str) -> str:
    choices = (wanted,) if wanted else _IMAGE_COLUMNS
    column = next((choice for choice in choices if choice in schema.names), None)
    if column is None:
        raise InputError(
            f"{shown} has no column {' or '.join(map(repr, choices))}, only "
            f"{', '.join(schema.names)}",
            advice="name the column of images with --image-column",
        )
    if not _holds_bytes(kind := schema.field(column).type):
        raise InputError(
            f"{shown}: column {column!r} is {kind}; expected binary (encoded images), or a struct "
            "of `bytes` and `path` as in Hugging Face data sets"
        )
    return column


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
