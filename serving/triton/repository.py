"""Assembly of a Triton model repository from `model_repository/` and a bundle.

The committed `config.pbtxt` files are parsed as protobuf and completed with values from the bundle.
Each is written next to the files that its model needs: `model.py` or the graph, and the part of the
bundle that the model reads. `serving.triton.server` starts the server.
"""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import SHORT_TEXT
from serving.bundles.manifest import TOWERS, Artifact, Latency, Manifest, Tower
from serving.errors import BundleError, InputError, RunnerError
from serving.runners.autotune import passed, prefix_tree_runner, time_runners
from serving.runners.spec import RUNNERS, RunnerSpec, graph_of, known, runtime_of
from serving.runners.tensor_rt import fitting_plan
from serving.util.files import check_replaceable, link_or_copy, new_directory
from serving.util.machine import cpu_count
from serving.util.progress import Progress, silent
from serving.util.typed_json import json_text

Backend = Literal["python", "onnxruntime", "tensorrt"]
ModelConfig = Any  # tritonclient ships no stubs for its protobuf modules

SOURCE = next(
    path
    for parent in Path(__file__).resolve().parents[1:3]
    if (path := parent / "model_repository").is_dir()
)
"""The committed model repository: inside the installed package `serving`, or next to it in a
checkout."""
_SIGN = "image_tower/config.pbtxt"
"""File that identifies a directory as an assembled repository."""
_TOWERS: dict[str, Tower] = {"image_tower": "image", "text_tower": "text"}
_WITH_TOKENIZER = ("text_tokenize", "clip_zero_shot")
_WARM_UP_BATCHES = (1, 8, 32)
_PREPROCESS = ("image_preprocess", "image_preprocess_large")
_CPUS_PER_LARGE = 4  # CPUs for each process that decodes large images
_LARGE_WAITING = 8  # requests with large images that wait for each of these processes
_TREE_TEXTS = 256  # texts in a request to `prefix_tree`: a few batches, one chunk of a label set

MAX_QUEUE = 512
"""Maximum number of requests that wait for a model. The last one waits this many times the duration
of a request, and each keeps its images in memory: before the tower, 0.15 MB per image of 224 x 224
pixels."""


def assemble(
    bundle: Bundle,
    target: Path,
    *,
    backend: Backend = "python",
    runner: str = "auto",
    precision: str = "fp32",
    max_batch_size: int = 64,
    max_queue: int = MAX_QUEUE,
    allow_failed: bool = False,
    fallback: bool = False,
    exif_orientation: bool = False,
    scale_16_bit: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write a model repository for `bundle` to `target`, and return `target`.

    An older repository at `target` stays intact until the new one is complete. Label sets are
    embedded as prefix trees if the backend is `python` and the bundle has a prefix tree graph that
    passed the parity gate.

    Args:
        backend: `python` runs the towers in Triton's Python backend through a runner of this
            project, in the embedded server or in any Triton container with this package installed.
            The other values name a backend that the serving container must have.
        runner: runner for the Python backend. `auto` times the runners that passed the parity gate
            on this machine and selects the fastest for each tower.
        precision: precision of the graphs or engines for the other backends.
        max_batch_size: largest batch of every model.
        max_queue: maximum number of requests that wait for a model; the server rejects more.
        allow_failed: also use artifacts that failed the parity gate.
        fallback: use `onnxruntime` with the graphs if TensorRT has no engine for this machine.
        exif_orientation: rotate and mirror images as their EXIF orientation says.
        scale_16_bit: scale 16-bit grayscale images to 8 bits instead of clipping their values.

    Raises:
        BundleError: an artifact is missing, is not the exported file, or failed the parity gate.
        RunnerError: the runner is unknown, or no engine fits this machine; the message says what
            differs.
        InputError: `target` contains files that are not a model repository.
    """
    image = replace(
        bundle.manifest.image, exif_orientation=exif_orientation, scale_16_bit=scale_16_bit
    )
    bundle = Bundle(bundle.path, replace(bundle.manifest, image=image))
    if backend == "tensorrt":
        try:
            return _assemble(
                bundle,
                target,
                backend,
                _engines(precision),
                max_batch_size,
                max_queue,
                allow_failed,
            )
        except (BundleError, RunnerError) as error:
            if not fallback:
                raise
            progress(f"falling back from TensorRT to ONNX Runtime: {error}")
            backend = "onnxruntime"
    chosen = dict.fromkeys(TOWERS, f"onnxruntime:{precision}")
    tree = None
    if backend == "python" and runner == "auto":
        latencies = [_timed(bundle, tower, allow_failed) for tower in TOWERS]
        chosen = {timed[0].tower: timed[0].runner for timed in latencies}
        every = tuple(latency for timed in latencies for latency in timed)
        bundle = Bundle(bundle.path, replace(bundle.manifest, latencies=every))
    elif backend == "python":
        chosen = dict.fromkeys(TOWERS, runner)
    runners = {tower: known(name) for tower, name in chosen.items()}
    if backend == "python":
        tree = prefix_tree_runner(bundle, runner, runners["text"])
    return _assemble(
        bundle, target, backend, runners, max_batch_size, max_queue, allow_failed, tree
    )


def _engines(precision: str) -> dict[Tower, RunnerSpec]:
    """Return the runner of each tower whose verdict decides whether engines may be served."""
    spec = known(RunnerSpec("tensorrt", "tf32" if precision == "fp32" else precision))
    return dict.fromkeys(TOWERS, spec)


def _assemble(
    bundle: Bundle,
    target: Path,
    backend: Backend,
    chosen: dict[Tower, RunnerSpec],
    max_batch_size: int,
    max_queue: int,
    allow_failed: bool,
    tree: RunnerSpec | None = None,
) -> Path:
    towers = {}
    for model, tower in _TOWERS.items():
        artifact = _artifact(bundle, tower, spec := chosen[tower], max_batch_size)
        if not allow_failed and not artifact.passed(spec):
            raise _failed(artifact, spec)
        towers[model] = artifact, spec
    if tree is not None:
        towers["prefix_tree"] = bundle.artifact("prefix_tree", graph_of(tree)), tree
    with new_directory(target, _SIGN) as work:
        for source in sorted(path.parent for path in SOURCE.glob("*/config.pbtxt")):
            if source.name == "prefix_tree" and tree is None:
                continue
            version = work / source.name / "1"
            version.mkdir(parents=True)
            config = model_config(source.name, bundle.manifest, backend, max_batch_size, max_queue)
            if source.name == "clip_zero_shot" and tree is not None:
                config.parameters["prefix_tree_chunk"].string_value = str(_TREE_TEXTS)
            if source.name in towers:
                _add_tower(bundle, *towers[source.name], config, version)
            elif source.name in (*_PREPROCESS, *_WITH_TOKENIZER):
                files = [bundle.tokenizer] if source.name in _WITH_TOKENIZER else []
                _add_python_model(bundle, source.name, version, files)
            (work / source.name / "config.pbtxt").write_text(text_format.MessageToString(config))
    return target


def _artifact(bundle: Bundle, tower: Tower, runner: RunnerSpec, max_batch_size: int) -> Artifact:
    """Return the artifact that `runner` runs; for TensorRT, the engine built for this machine."""
    library, precision = runtime_of(runner).library, graph_of(runner)
    if library is None:
        return bundle.artifact(tower, precision)
    plan = fitting_plan(bundle, tower, precision, library)
    assert plan.engine is not None
    again = bundle.build_command(precision, library)
    if plan.engine.weights_stripped:
        raise BundleError(
            f"{plan.file} was built without its weights, and Triton cannot refit them",
            advice=f"build it without --strip-weights: {again}",
        )
    most = min(profile.maximum[0] for profile in plan.engine.profiles)
    if max_batch_size > most:
        raise BundleError(
            f"{plan.file} supports batches of up to {most}, requested are {max_batch_size}",
            advice=f"assemble with --max-batch-size {most}, or build it again: {again} "
            f"--max-batch-size {max_batch_size}",
        )
    return plan


def check_repository(target: Path) -> None:
    """Check that `assemble` can write to `target`.

    Raises:
        InputError: it cannot be written, or holds other files.
    """
    check_replaceable(target, _SIGN)


def check_assembled(repository: Path) -> None:
    """Check that `repository` is a directory with at least one model.

    Raises:
        InputError: it is missing, empty, or contains other files.
    """
    if any(repository.glob("*/config.pbtxt")):
        return
    found = "does not exist"
    if repository.is_dir():
        found = "contains other files" if any(repository.iterdir()) else "is empty"
    elif repository.exists():
        found = "is a file"
    raise InputError(
        f"{repository} {found}; expected a model repository",
        advice=f"create one with `clip-deploy assemble BUNDLE --output {repository}`",
    )


def assembled_latencies(repository: Path) -> tuple[Latency, ...]:
    """Return the latencies that the runners were selected by, fastest first for each tower."""
    return Bundle.open(repository / "image_preprocess" / "1" / "bundle").manifest.latencies


def assembled_backend(repository: Path) -> str:
    """Return the backend that runs the towers of an assembled repository.

    It differs from the requested backend when `assemble` fell back to ONNX Runtime.
    """
    text = (repository / "image_tower" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    if config.platform == "tensorrt_plan":
        return "tensorrt"
    return str(config.backend)


def _timed(bundle: Bundle, tower: Tower, allow_failed: bool) -> list[Latency]:
    has = {a.precision for a in bundle.manifest.artifacts if a.graph == tower}
    every = [spec for spec in RUNNERS if graph_of(spec) in has]
    return time_runners(bundle, tower, every if allow_failed else passed(bundle, tower))


def model_config(
    name: str,
    manifest: Manifest,
    backend: Backend,
    max_batch_size: int,
    max_queue: int = MAX_QUEUE,
) -> ModelConfig:
    """Return the committed configuration of model `name`, completed for a bundle and a backend."""
    text = (SOURCE / name / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    if name == "clip_zero_shot":  # splits its inputs into batches itself
        config.parameters["chunk"].string_value = str(max_batch_size)
    elif config.max_batch_size:
        config.max_batch_size = _TREE_TEXTS if name == "prefix_tree" else max_batch_size
    _set_dimensions(config, manifest)
    if config.platform == "ensemble":  # has no queue of its own
        _set_facts(config, manifest)
    elif name in _PREPROCESS:
        _set_processes(config, max_queue)
    elif name not in _TOWERS or backend == "python":
        config.parameters["max_queue"].string_value = str(max_queue)
    if name in _TOWERS and backend != "python":
        _set_backend(config, backend, manifest)
        _set_warm_up(config, manifest)
    return config


def _set_processes(config: ModelConfig, max_queue: int) -> None:
    """Set the numbers of processes that decode images, and of requests that wait for them."""
    # Triton's own queue bound works with two or more instances only; see admission.py.
    processes = max(2, cpu_count())
    large = max(1, cpu_count() // _CPUS_PER_LARGE)
    if config.name != "image_preprocess":
        config.instance_group[0].count = large
        return
    config.instance_group[0].count = processes
    config.dynamic_batching.default_queue_policy.max_queue_size = max_queue
    config.parameters["max_queue"].string_value = str(max_queue)
    waiting = max(1, _LARGE_WAITING * large // processes)
    config.parameters["max_large"].string_value = str(waiting)


def _add_tower(
    bundle: Bundle, artifact: Artifact, runner: RunnerSpec, config: ModelConfig, version: Path
) -> None:
    bundle.verified(artifact)
    files = [bundle.path / file.name for file in artifact.files]
    if config.backend == "python":
        config.parameters["runner"].string_value = str(runner)
        _add_python_model(bundle, config.name, version, files)
        return
    link_or_copy(files[0], version / config.default_model_filename)
    for file in files[1:]:
        # External data, which the graph refers to by this name, or the sidecar of an engine.
        link_or_copy(file, version / file.name)


def _add_python_model(bundle: Bundle, name: str, version: Path, files: list[Path]) -> None:
    """Add `model.py` and the part of the bundle that it reads."""
    shutil.copy(SOURCE / name / "1" / "model.py", version)
    directory = version / "bundle"
    directory.mkdir()
    (directory / "manifest.json").write_text(bundle.manifest.to_json())
    for file in files:
        link_or_copy(file, directory / file.name)


def _failed(artifact: Artifact, runner: RunnerSpec) -> BundleError:
    measured = [
        f"minimum cosine {v.min_cosine:.6f}, largest difference {v.max_abs_difference:.1e}"
        + ("" if v.relative_accuracy is None else f", {v.relative_accuracy:.2%} of fp32's accuracy")
        for v in artifact.verdicts
        if v.runner == str(runner)
    ]
    return BundleError(
        f"the {artifact.tower} tower by {runner} did not pass the parity gate "
        f"({measured[0] if measured else 'no verdict'})",
        advice="run `clip-deploy verify` for details, choose another runner, or assemble with "
        "--allow-failed to serve it anyway",
    )


def _set_dimensions(config: ModelConfig, manifest: Manifest) -> None:
    dimensions = {
        "pixels": [3, manifest.image.size, manifest.image.size],
        "image_embeds": [manifest.embed_dim],
        "text_embeds": [manifest.embed_dim],
    }
    for tensor in (*config.input, *config.output):
        if tensor.name in dimensions:
            batch = [] if config.max_batch_size else [-1]
            tensor.dims[:] = batch + dimensions[tensor.name]


def _set_facts(config: ModelConfig, manifest: Manifest) -> None:
    """Store facts for clients as parameters, which `get_model_config` returns."""
    facts = {
        "model": manifest.name,
        "architecture": manifest.architecture,
        "weights": manifest.provenance.weights,
        "weights_sha256": manifest.provenance.weights_sha256,
        "embed_dim": str(manifest.embed_dim),
        "logit_scale": repr(manifest.logit_scale),
        "templates": json_text(manifest.templates),
        "context_length": str(manifest.text.context_length),
        "image": json_text(manifest.image),
    }
    for key, value in facts.items():
        config.parameters[key].string_value = value


def _set_backend(config: ModelConfig, backend: Backend, manifest: Manifest) -> None:
    """Configure a tower for a native backend of the serving container."""
    group, kinds = config.instance_group[0], model_config_pb2.ModelInstanceGroup
    for tensor in config.input:
        tensor.ClearField("allow_ragged_batch")  # only our model.py pads ragged batches
    if backend == "tensorrt":
        config.ClearField("backend")
        config.platform = "tensorrt_plan"
        config.default_model_filename = "model.plan"
        group.kind = kinds.KIND_GPU
        long_texts = manifest.text.context_length > SHORT_TEXT
        two_profiles = config.name == "text_tower" and long_texts  # short and full length
        group.profile[:] = ["0", "1"] if two_profiles else ["0"]
    else:
        config.backend = backend
        config.default_model_filename = "model.onnx"
        group.kind = kinds.KIND_AUTO
        group.ClearField("count")  # one instance per GPU, or one on the CPU


def _set_warm_up(config: ModelConfig, manifest: Manifest) -> None:
    """Set preferred batch sizes, and a warm-up run of each before the model reports ready.

    TensorRT also captures a CUDA graph for each batch size and each text length that the tokenizer
    pads to.
    """
    sizes = [size for size in _WARM_UP_BATCHES if size <= config.max_batch_size]
    config.dynamic_batching.preferred_batch_size[:] = sizes[1:]
    tensor = config.input[0]
    lengths = manifest.text.buckets if config.name == "text_tower" else (None,)
    for size, length in itertools.product(sizes, lengths):
        dims = [length] if length else list(tensor.dims)
        warmup = config.model_warmup.add()
        warmup.name = f"batch {size}" + (f" length {length}" if length else "")
        warmup.batch_size = size
        data = warmup.inputs[tensor.name]
        data.data_type = tensor.data_type
        data.dims[:] = dims
        data.zero_data = True
        if config.platform == "tensorrt_plan":
            config.optimization.cuda.graphs = True
            graph = config.optimization.cuda.graph_spec.add()
            graph.batch_size = size
            graph.input[tensor.name].dim[:] = dims
