"""Errors are restored after a transfer through Triton, and its own messages are classified."""

import pytest

from serving.errors import (
    ClipDeployError,
    DeadlineError,
    ImageError,
    InputError,
    OverloadedError,
    TextError,
    TextTooLongError,
    UnavailableError,
)
from serving.util.wire import from_text, own_words, to_text, triton_fault

ERRORS = [
    InputError("the request has 300 labels, more than 256", advice="send fewer"),
    ImageError("the image is truncated", kind="images", index=0, name="a cat.jpg"),
    ImageError("", kind="images", index=7),
    TextError("the text is empty", kind="texts", index=31),
    TextTooLongError("102 tokens; 77 fit", kind="labels", index=2, advice="shorten it"),
    TextError('with "quotes", \\, a\nnew line, #clip {"type": 1} and 🐈', kind="labels", index=1),
    DeadlineError("the time of 0.5 s was over"),
    UnavailableError("clip_image is not ready"),
    OverloadedError("text_tower is full", advice="try again later"),
]


def same(error: ClipDeployError, other: ClipDeployError | None) -> bool:
    return type(error) is type(other) and vars(error) == vars(other) and str(error) == str(other)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_round_trip(error):
    """The type and every field are kept, whatever the message contains, also through an
    ensemble."""
    text = to_text(error)
    assert text.startswith(str(error))
    assert same(error, from_text(text))
    assert same(error, from_text(own_words(f"in ensemble 'clip_image', {text}")))


@pytest.mark.parametrize(
    "message",
    [
        "",
        "images[2]: the image is truncated",
        "text #clip {}",
        "\n#clip ",
        "\n#clip nothing",
        "\n#clip []",
        "\n#clip 3",
        "\n#clip {}",
        '\n#clip {"type": "SystemExit", "reason": ""}',
        '\n#clip {"type": ["ImageError"]}',
        '\n#clip {"type": "ImageError", "reason": "cut o',
        '\n#clip {"type": "ImageError", "reason": "", "place": 3}',
        '\n#clip {"type": "OverloadedError", "reason": "", "index": 3}',
    ],
)
def test_other_messages_have_no_fields(message):
    assert from_text(message) is None


def test_error_that_servers_do_not_send_is_not_rebuilt():
    """A client rebuilds only errors that a server sends."""
    assert from_text(to_text(ClipDeployError("the disk is full"))) is None


# Triton's messages, with status codes of gRPC and of HTTP, as Triton 2.51 sent them: a full queue
# of two, a request timeout of 3 ms, a client timeout of 10 ms, and wrong requests; a server that
# was stopped or killed under load, and models that were loaded and unloaded.
RECORDED = {
    "late": [
        "in ensemble 'clip_image', Request timeout expired",
        "Deadline Exceeded",
        "Stream removed (Deadline Exceeded)",
    ],
    "full": ["in ensemble 'clip_image', [request id: <id_unknown>] Exceeds maximum queue size"],
    "unknown model": [
        "Request for unknown model: 'nobody' is not found",
        "Request for unknown model: 'slow' has no available versions",
    ],
    "unavailable": [
        "in ensemble 'clip_image', [request id: <id_unknown>] Server is stopping, scheduler for "
        "model has stopped accepting new inference requests",
        "in ensemble 'clip_image', Stub process 'image_preprocess_0_0' is not healthy.",
        "Stub process 'clip_zero_shot_0_0' is not healthy.",
        "Model clip_image - Error when running inference: Server not ready",  # one model to another
    ],
    "restricted": [
        "This API is restricted, expecting header 'admin-key'",
        "This protocol is restricted, expecting header 'triton-grpc-protocol-admin-key'",
    ],
    "other": [
        "[request id: <id_unknown>] inference input 'input_ids' data-type is 'INT64', but model "
        "'text_tower' expects 'INT32'",
        "unexpected inference input 'other' for model 'text_tower'",
        "[request id: <id_unknown>] unexpected shape for input 'image' for model 'clip_image'. "
        "Expected [-1,1], got [1].",
    ],
}


@pytest.mark.parametrize(
    ("fault", "message"), [(fault, message) for fault in RECORDED for message in RECORDED[fault]]
)
def test_triton_messages_are_classified(fault, message):
    assert triton_fault(message) == triton_fault(own_words(message)) == fault
    assert from_text(message) is None
    assert not own_words(message).startswith("in ensemble")
