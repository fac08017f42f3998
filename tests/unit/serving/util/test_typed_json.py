"""JSON documents hold finite numbers and distinct keys, whether they are written or read."""

import ast
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from serving.errors import InputError
from serving.util.results import Results
from serving.util.typed_json import from_json, json_text, parse_json
from tests.support.paths import CHECKOUT

PACKAGES = ("serving", "export", "benchmarks", "training", "model_repository")
ONLY = "serving/util/typed_json.py"


@dataclass(frozen=True, kw_only=True)
class Inner:
    mean: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Outer:
    image: Inner
    scale: float = 1.0
    path: Path | None = None


def test_only_one_module_imports_json():
    users = []
    for package in PACKAGES:
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if {name.partition(".")[0] for name in names} & {"json", "simplejson", "orjson"}:
                    users.append(path.relative_to(CHECKOUT).as_posix())
    assert users == [ONLY]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
@pytest.mark.parametrize("indent", [None, 2])
def test_number_that_is_not_finite_is_not_written(number, indent):
    document = Outer(image=Inner(mean=(0.5, float(number))))
    for value in (document, [document], {"one": document}):
        with pytest.raises(InputError) as caught:
            json_text(value, indent=indent)
        assert caught.value.name.endswith("image.mean[1]")


def test_written_documents_are_those_of_the_standard_library():
    value = {"b": [1, 2.5, None, True, "é"], "a": {"x": -0.0}}
    assert json_text(value) == json.dumps(value)
    assert json_text(value, indent=2) == json.dumps(value, indent=2)
    assert json_text(value, ascii_only=False) == json.dumps(value, ensure_ascii=False)
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert json_text(value, canonical=True) == canonical
    assert parse_json(json_text(value)) == parse_json(json_text(value).encode()) == value
    assert json_text(Outer(image=Inner(mean=()), path=Path("a"))) == json.dumps(
        {"image": {"mean": []}, "scale": 1.0, "path": "a"}
    )


def test_other_types_are_not_written_as_text():
    for value in (np.float32(0.5), np.zeros(2), {1, 2}, object()):
        with pytest.raises(TypeError):
            json_text({"value": value})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_number_that_is_not_finite_is_not_read(number):
    with pytest.raises(ValueError, match=r"^image\.mean\[1\]: "):
        parse_json(f'{{"image": {{"mean": [0.5, {number}]}}}}')
    with pytest.raises(ValueError, match=r"^document: "):
        parse_json(number)


def test_key_that_occurs_twice_is_not_read():
    with pytest.raises(ValueError, match="'scale' twice"):
        parse_json('{"image": {"scale": 1, "other": 2, "scale": 1}}')


@pytest.mark.parametrize("text", ["", "{", "[1,]", b"\xff", "[" * 100_000])
def test_text_that_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011  the libraries' messages
        parse_json(text)


@pytest.mark.parametrize("number", [math.nan, math.inf, 10**400])
def test_fields_of_dataclasses_are_finite(number):
    with pytest.raises(ValueError, match=r"^image\.mean\[0\]: "):
        from_json(Outer, {"image": {"mean": [number]}})
    assert from_json(Outer, {"image": {"mean": [1]}, "scale": 2}).scale == 2.0


def test_benchmark_results_name_the_number_that_is_not_finite(tmp_path):
    results = Results.read(CHECKOUT / "benchmarks" / "results" / first_results())
    run = results.latency[0]
    object.__setattr__(run.towers[0], "cosine", math.nan)
    with pytest.raises(InputError) as caught:
        results.write(tmp_path)
    assert caught.value.name == "latency[0].towers[0].cosine"
    assert not list(tmp_path.iterdir())


def first_results() -> str:
    found = sorted((CHECKOUT / "benchmarks" / "results").rglob("results.json"))
    paths = [path for path in found if Results.read(path).latency]
    return str(paths[0].relative_to(CHECKOUT / "benchmarks" / "results"))
