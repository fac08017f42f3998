"""JSON documents: the only module that reads and writes JSON, and typed conversion to dataclasses.

JSON has no NaN and no infinities, but Python's `json` writes and reads them by default, and keeps
the last value of a key that occurs twice. Here such documents are errors that name the place.

`from_json` supports only the types that manifests use: scalars, tuples, string-keyed dictionaries,
literals, `X | None` and nested dataclasses.
"""

import contextlib
import dataclasses
import json
import math
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from serving.errors import InputError

T = TypeVar("T")


def json_text(
    value: Any, *, indent: int | None = None, canonical: bool = False, ascii_only: bool = True
) -> str:
    """Return the JSON text of a document.

    Args:
        value: dataclasses, string-keyed dictionaries, sequences, paths and scalars.
        indent: spaces per nesting level; None: one line.
        canonical: sort the keys of objects and leave out spaces, for checksums.
        ascii_only: escape characters that are not ASCII.

    Raises:
        InputError: a number is NaN or infinite; its `name` is the place, such as `image.mean[0]`.
        TypeError: the document contains another type.
    """
    try:
        return json.dumps(
            value,
            indent=indent,
            sort_keys=canonical,
            separators=(",", ":") if canonical else None,
            ensure_ascii=ascii_only,
            allow_nan=False,
            default=_plain,
        )
    except ValueError:
        if (found := _not_finite(value)) is None:  # such as a circular reference
            raise
        place, number = found
        raise InputError(
            f"expected a finite number, found {number}, which JSON cannot represent", name=place
        ) from None


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON document.

    Raises:
        ValueError: the text is not JSON, an object has a key twice, or a number is NaN, infinite,
            or too large for a float; the message names the place, such as `image.mean[0]`.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return _STRICT.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except _NotFiniteError:
        place, found = _not_finite(json.loads(text)) or ("document", math.nan)
        raise ValueError(f"{place}: expected a finite number, found {found}") from None


class _NotFiniteError(Exception):
    """A number in a JSON text that is NaN, infinite, or too large for a float."""


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _NotFiniteError
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


_STRICT = json.JSONDecoder(parse_float=_number, parse_constant=_number, object_pairs_hook=_distinct)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"expected a dataclass or a type of JSON, got {type(value).__name__}")


def _not_finite(value: Any, where: str = "") -> tuple[str, float] | None:
    """Return place and value of the first number that is not finite; None if there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (where or "document", float(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    return next(filter(None, (_not_finite(item, place) for place, item in items)), None)


def from_json(kind: type[T], value: Any) -> T:
    """Build an instance of the dataclass `kind` from the result of `parse_json`.

    Raises:
        ValueError: `value` does not match; the message names the place, such as `image.size`.
    """
    built: T = _convert(kind, value, "")
    return built


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where)
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise _misfit(where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _misfit(where, "a list", value)
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise _misfit(where, f"{len(arguments)} items", value)
        return tuple(
            _convert(item_kind, item, f"{where}[{index}]")
            for index, (item_kind, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise _misfit(where, "an object", value)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is UnionType:
        optional = next(argument for argument in arguments if argument is not NoneType)
        return None if value is None else _convert(optional, value, where)
    if kind is float and type(value) in (int, float):
        return _finite(value, where)
    if type(value) is not kind:
        raise _misfit(where, kind.__name__, value)
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(where, "an object", value)
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    if unknown := value.keys() - fields.keys():
        raise ValueError(f"{prefix}{min(unknown)}: not a known key")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if absent := required - value.keys():
        raise ValueError(f"{prefix}{min(absent)}: missing")
    return kind(
        **{name: _convert(hints[name], item, prefix + name) for name, item in value.items()}
    )


def _finite(value: int | float, where: str) -> float:
    with contextlib.suppress(OverflowError):  # an integer that is too large for a float
        if math.isfinite(value):
            return float(value)
    raise _misfit(where, "a finite number", value)


def _misfit(where: str, expected: str, value: Any) -> ValueError:
    shown = repr(value)
    return ValueError(
        f"{where or 'document'}: expected {expected}, found {shown[:60]}{'...' * (len(shown) > 60)}"
    )
