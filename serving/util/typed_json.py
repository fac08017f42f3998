"""Convert JSON documents to frozen dataclasses, checked against their annotations.

Supports only the types that manifests use: scalars, tuples, string-keyed dictionaries, literals,
`X | None` and nested dataclasses. Errors name the place in the document.
"""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], value: Any) -> T:
    """Build an instance of the dataclass `kind` from the result of `json.loads`.

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
    if kind is float and type(value) is int:
        return float(value)
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


def _misfit(where: str, expected: str, value: Any) -> ValueError:
    shown = repr(value)
    return ValueError(
        f"{where or 'document'}: expected {expected}, found {shown[:60]}{'...' * (len(shown) > 60)}"
    )
