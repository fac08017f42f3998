"""A pytest plugin that makes `pytest.raises(..., match=...)` ignore case."""

import re
from typing import Any

import pytest

_raises = pytest.raises


def raises(*arguments: Any, match: str | re.Pattern[str] | None = None, **options: Any) -> Any:
    """`pytest.raises` for errors whose wording is now capitalized."""
    if match is not None:
        options["match"] = re.compile(match, re.IGNORECASE)
    return _raises(*arguments, **options)


pytest.raises = raises
