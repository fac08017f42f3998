"""The text tower over prefix trees: embeddings equal those of single texts in every runtime."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import CLIPModel

from export.checkpoints.load import load_checkpoint
from export.gate.datasets import load_data, probe_prompts
from export.gate.verify import judged, references, verify
from export.graphs.lint import lint
from export.towers.prefix_tree import PrefixTreeTower, in_trees
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import Artifact, Graph
from serving.errors import BundleError, RunnerError
from serving.inputs.prefix_tree import trees
from serving.inputs.tokenizer import Tokenizer
from serving.runners.autotune import passed
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec, runners_of
from serving.util.progress import silent
from tests.support.references import some_ids, unit

RUNNERS = ["onnxruntime:fp32", "onnxruntime:int8", "openvino:fp32"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def bundle(tree_bundle) -> Bundle:
    return tree_bundle


def artifact(bundle: Bundle, precision: str) -> Artifact:
    return bundle.artifact("prefix_tree", precision)


@pytest.fixture(scope="module")
def texts(checkpoint) -> np.ndarray:
    """Texts with and without shared prefixes, two equal texts, a single text, and an empty one."""
    alike = probe_prompts(checkpoint.text, 60, 20, seed=5)
    ids = np.full((70, 77), checkpoint.text.pad_id, np.int32)
    ids[:60, :20] = alike
    ids[60:68] = some_ids([1, 5, 7, 30, 60, 75, 76, 76])
    ids[68], ids[69] = ids[3], ids[65]
    return ids


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint, texts) -> np.ndarray:
    """Embeddings by transformers, each text padded to 77 tokens."""
    model = CLIPModel.from_pretrained(tiny_checkpoint).eval()
    with torch.inference_mode():
        out = model.text_model(input_ids=torch.from_numpy(texts).long())
        return unit(model.text_projection(out.pooler_output))


def cosines(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    return (got.astype(np.float64) * want).sum(axis=1)


def test_prefix_tree_tower_equals_transformers_in_pytorch(checkpoint, texts, theirs):
    tower = PrefixTreeTower(checkpoint.clip.text).eval()
    seen = []
    for batch in trees(texts, checkpoint.text.end_id):
        with torch.inference_mode():
            got = tower(torch.from_numpy(batch.nodes)).numpy()
        np.testing.assert_allclose(got[batch.leaves], theirs[batch.texts], atol=1e-5)
        seen += batch.texts.tolist()
    assert sorted(seen) == list(range(len(texts)))


@pytest.mark.parametrize("name", RUNNERS)
def test_every_runner_equals_transformers(bundle, texts, theirs, name):
    with open_prefix_tree(bundle, name) as runner:
        assert runner.name == name
        got = runner.run(texts)
        assert (got.dtype, got.shape) == (np.float32, theirs.shape)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
        if name.endswith("fp32"):
            np.testing.assert_allclose(got, theirs, atol=1e-5)
            assert cosines(got, theirs).min() >= 0.99999
        else:
            assert cosines(got, theirs).min() >= 0.98
        for one in (0, 66, 60):  # single texts: the longest and the shortest possible
            np.testing.assert_allclose(runner.run(texts[[one]]), got[[one]], atol=2e-2)


def test_text_and_prefix_tree_graphs_agree_in_int8(bundle, texts):
    with (
        open_prefix_tree(bundle, "onnxruntime:int8") as tree,
        open_runner(bundle, "text", "onnxruntime:int8") as plain,
    ):
        assert cosines(tree.run(texts), plain.run(texts)).min() >= 0.98


# ------------------------------------------------------------------ the bundle


def test_export_adds_prefix_tree_graphs(bundle, tiny_bundle):
    made = [a for a in bundle.manifest.artifacts if a.graph == "prefix_tree"]
    assert [(a.tower, a.precision, a.file) for a in made] == [
        ("text", "fp32", "prefix_tree.fp32.onnx"),
        ("text", "int8", "prefix_tree.int8.onnx"),
    ]
    assert not any(a.graph == "prefix_tree" for a in tiny_bundle.manifest.artifacts)
    fp32, int8 = made
    assert fp32.files == (describe_file(bundle.path / fp32.file),)
    assert {v.runner for v in fp32.verdicts} >= {"onnxruntime:fp32", "openvino:fp32"}
    assert {v.runner for v in int8.verdicts} == {"onnxruntime:int8", "openvino:int8"}
    for runner in RUNNERS:
        assert artifact(bundle, RunnerSpec.parse(runner).precision).passed(runner)
    assert int8.quantisation is not None
    plain = bundle.artifact("text", "int8").quantisation
    assert int8.quantisation.layers == plain.layers == 12
    assert int8.files[0].bytes < fp32.files[0].bytes
    # Each verdict covers as many texts as the verdict on the text graph.
    assert fp32.verdicts[0].embeddings == bundle.artifact("text", "fp32").verdicts[0].embeddings


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_prefix_tree_graph_has_no_findings(bundle, precision):
    path = bundle.verified(artifact(bundle, precision))
    assert lint(path, "prefix_tree") == []
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    (given,), (made,) = graph.input, graph.output
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == [
        "rows",
        2,
        "nodes",
    ]
    assert (given.name, made.name) == ("trees", "text_embeds")
    assert made.type.tensor_type.shape.dim[1].dim_value == 32


def test_lint_checks_prefix_tree_graphs(bundle, tmp_path):
    path = tmp_path / "prefix_tree.fp32.onnx"
    model = onnx.load(bundle.path / path.name)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 9
    model.graph.node.append(onnx.helper.make_node("NonZero", ["trees"], ["other"]))
    onnx.save(model, path)
    assert lint(path, "prefix_tree") == [
        "prefix_tree.fp32.onnx: trees has shape ['rows', 2, 9]; of 3 axes 0 and 2 must be dynamic",
        "prefix_tree.fp32.onnx: 2 NonZero nodes; expected one, which finds the end-of-text token",
    ]


def test_runners_of_prefix_tree_graphs(bundle):
    assert [str(spec) for spec in runners_of(artifact(bundle, "fp32"))] == [
        "onnxruntime:fp32",
        "openvino:fp32",
        "openvino:bf16",
    ]
    assert {"onnxruntime:fp32", "onnxruntime:int8"} <= set(map(str, passed(bundle, "prefix_tree")))


def test_verdict_on_one_graph_does_not_count_for_the_other(bundle):
    """If the text graph or the prefix-tree graph failed the parity gate, no runner is offered
    for it."""

    def refused(graph: Graph) -> Bundle:
        artifacts = tuple(
            replace(a, verdicts=()) if a.graph == graph else a for a in bundle.manifest.artifacts
        )
        return Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))

    assert passed(refused("text"), "text") == []
    assert passed(refused("text"), "prefix_tree") == passed(bundle, "prefix_tree")
    assert passed(refused("prefix_tree"), "prefix_tree") == []
    assert passed(refused("prefix_tree"), "text") == passed(bundle, "text")


def test_verify_measures_prefix_trees_again(bundle):
    again = verify(bundle, None, None, silent)
    before, after = (
        [a for a in b.manifest.artifacts if a.graph == "prefix_tree"] for b in (bundle, again)
    )
    assert [[(v.runner, v.passed) for v in a.verdicts] for a in after] == [
        [(v.runner, v.passed) for v in a.verdicts] for a in before
    ]


def shift_mask(model: onnx.ModelProto) -> None:
    """Make a node attend to its subtree's siblings too: `i < ends[j]` becomes `i <= ends[j]`."""
    (node,) = [n for n in model.graph.node if n.op_type == "Less"]
    node.op_type = "LessOrEqual"


def test_graph_that_mixes_branches_fails_the_gate(bundle, checkpoint, tmp_path):
    path = Path(shutil.copytree(bundle.path, tmp_path / "spoiled"))
    whole = artifact(bundle, "fp32")
    model = onnx.load(path / whole.file)
    shift_mask(model)
    onnx.save(model, path / whole.file)
    spoiled = replace(whole, files=(describe_file(path / whole.file),))
    manifest = replace(bundle.manifest, artifacts=(spoiled,))
    data = load_data(
        checkpoint.image,
        Tokenizer(bundle.tokenizer, checkpoint.text),
        checkpoint.templates,
        checkpoint.text,
        progress=silent,
    )
    found = judged(Bundle(path, manifest), spoiled, references(checkpoint, data, silent)["text"])
    assert found.verdicts
    assert not any(verdict.passed for verdict in found.verdicts)


def test_tampered_prefix_tree_graph_is_rejected(bundle, tmp_path):
    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    with (path / "prefix_tree.fp32.onnx").open("r+b") as file:
        file.seek(100_000)
        file.write(b"\1\2\3\4")
    with pytest.raises(BundleError, match=r"prefix_tree\.fp32\.onnx is not the file that was exp"):
        open_prefix_tree(Bundle.open(path), "onnxruntime:fp32").__enter__()


@pytest.mark.parametrize(
    ("name", "error", "shown"),
    [
        (
            "onnxruntime:fp16",
            BundleError,
            r"no fp16 prefix_tree graph, only fp32, int8; export .*"
            r"again with --prefix-tree --precision fp16",
        ),
        ("onnxruntime:int3", RunnerError, "unknown runner 'onnxruntime:int3'"),
    ],
)
def test_unavailable_prefix_tree_runner_is_rejected(bundle, name, error, shown):
    with pytest.raises(error, match=shown):
        open_prefix_tree(bundle, name)


def test_bundle_without_prefix_trees_is_rejected(tiny_bundle):
    with pytest.raises(BundleError, match="no fp32 prefix_tree graph, only none; export the check"):
        open_prefix_tree(tiny_bundle, "onnxruntime:fp32")


def test_invalid_token_ids_are_rejected(bundle, texts):
    with open_prefix_tree(bundle, "onnxruntime:fp32") as runner:
        with pytest.raises(RunnerError, match=r"int32 \[1, 5\] as trees: .* the end-of-text token"):
            runner.run(np.ones((1, 5), np.int32))
        outside = texts[:1].copy()
        outside[0, 1] = 60_000
        with pytest.raises(RunnerError, match=r"onnxruntime:fp32 cannot run int32 \[1, 2, \d+\]"):
            runner.run(outside)


def test_calibration_trees_contain_the_same_texts(checkpoint, texts):
    (given, *rest) = in_trees([texts[:4, :20], texts[4:5, :20]], checkpoint.text.end_id)
    assert len(rest) == 1
    found = {row[0].tobytes() for row in given}
    assert len(found) == len(given)
    assert (given[:, 0] == checkpoint.text.end_id).sum() == 4
