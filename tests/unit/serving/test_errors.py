"""Errors keep their parts as fields across batches, requests and processes."""

import copy
import inspect
from multiprocessing import Pipe

import pytest

import serving.errors
from serving.errors import ClipDeployError, ImageError, InputError, TextTooLongError


def classes() -> list[type[ClipDeployError]]:
    found = [value for value in vars(serving.errors).values() if inspect.isclass(value)]
    return [value for value in found if issubclass(value, ClipDeployError)]


def test_error_tree_in_the_docstring_is_complete():
    """Every class occurs once, below its base class."""
    drawing = [line for line in inspect.getdoc(serving.errors).splitlines() if "Error" in line]
    drawn: list[tuple[int, str]] = []
    parents = {}
    for line in drawing:
        name = next((word for word in line.split() if word.isidentifier() and "Error" in word), "")
        if name not in vars(serving.errors) or not line.lstrip(" │├└─").startswith(name):
            continue
        depth = line.index(name)
        parents[name] = next((above for at, above in reversed(drawn) if at < depth), None)
        drawn.append((depth, name))
    assert parents == {
        kind.__name__: None if kind is ClipDeployError else kind.__bases__[0].__name__
        for kind in classes()
    }


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_error_survives_copy_and_pickle(kind):
    """Processes send errors to each other."""
    error = kind("what arrived", advice="what to do")
    if isinstance(error, InputError):
        error = error.at("images", 3, "cat.jpg")
    receiver, sender = Pipe(duplex=False)
    sender.send(error)
    for other in (copy.copy(error), receiver.recv()):
        assert type(other) is kind
        assert vars(other) == vars(error)
        assert str(other) == str(error)


def test_index_is_relative_to_the_outermost_collection():
    """For a bad image of a request in a batch of a directory, the index counts from the
    outermost level."""
    inner = ImageError("the image is truncated", kind="images", index=2)
    assert inner.shifted(8).index == 10
    assert inner.shifted(8).at("images", 32).index == 42
    outer = inner.shifted(8).at("pictures", 32, "cat.jpg")
    assert (outer.kind, outer.index, outer.name) == ("pictures", 42, "cat.jpg")
    assert outer.at("other", 1, "dog.jpg").name == "cat.jpg"
    assert (inner.kind, inner.index, inner.name) == ("images", 2, None)
    assert InputError("no index").shifted(8).index is None


def test_error_text_has_location_reason_and_advice():
    error = TextTooLongError("102 tokens", kind="texts", index=3, advice="shorten it")
    assert str(error) == "texts[3]: 102 tokens; shorten it"
    assert str(error.within("cat")) == "texts[3] (cat): 102 tokens; shorten it"
    assert str(ImageError("is truncated", name="cat.jpg")) == "cat.jpg: is truncated"
    assert str(error.advised("cut it").at("labels", 0)).endswith("; cut it")
    assert str(ClipDeployError("the disk is full")) == "the disk is full"
