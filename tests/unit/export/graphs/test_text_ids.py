"""Tests that any token ids are safe in a text graph: no request can fail or change another one.

Backends of Triton other than Python run the graphs without a check of the ids.
"""

import numpy as np
import pytest

from serving.runners.registry import open_runner

RUNNERS = ("onnxruntime:fp32", "onnxruntime:fp16", "onnxruntime:int8", "openvino:int8")
GOOD = [49406, 320, 2368, 539, 49407, 0, 0, 0]


@pytest.fixture(params=RUNNERS)
def run(request, tiny_bundle):
    with open_runner(tiny_bundle, "text", request.param) as runner:
        yield lambda rows: runner.run(np.asarray(rows, np.int32))


@pytest.fixture
def spec(tiny_bundle):
    return tiny_bundle.manifest.text


def test_bad_ids_do_not_affect_the_other_texts_of_a_batch(run, spec):
    alone = run([GOOD, GOOD])
    for bad in (-1, -(2**31), spec.vocab_size, 2**31 - 1):
        row = [49406, bad, 2368, 539, 49407, 0, 0, 0]
        found = run([GOOD, row])
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[0], alone[0], atol=2e-3)  # INT8 runtimes round per batch
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)


def test_ids_outside_the_vocabulary_are_read_as_0(run, spec):
    rows = [[49406, bad, 2368, 49407] for bad in (0, -1, spec.vocab_size, 2**31 - 1)]
    found = run(rows)
    np.testing.assert_array_equal(found[1:], np.broadcast_to(found[0], found[1:].shape))
    # An id that is too large is not the end of the text, although it is the largest in the table.
    assert not np.allclose(run([[49406, 320, 49407, 5]]), run([[49406, 320, 2**30, 5]]), atol=1e-2)


def test_text_without_an_end_is_pooled_at_its_last_position(run):
    """The causal mask makes the result independent of what follows."""
    found = run([[49406, 320, 2368, 539]])
    padded = run([[49406, 320, 2368, 49407]])
    assert not np.allclose(found, padded, atol=1e-2)
    assert not np.allclose(found, run([[49406, 1, 2, 3]]), atol=1e-2)  # not at the first position


def test_text_longer_than_the_context_is_cut_off(run, spec):
    ids = np.full((2, 2 * spec.context_length), 320)
    ids[:, 0], ids[1, 5] = 49406, spec.end_id
    np.testing.assert_array_equal(run(ids), run(ids[:, : spec.context_length]))
