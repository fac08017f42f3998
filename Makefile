# make setup    Create .venv with all dependencies. The other targets run it first.
# make demo     Export the demo checkpoint, serve it with Triton, classify and search images.
# make test     Run the unit and integration tests.
# make robustness
#               Run the tests of faults, overload, fuzzing, isolation and security, one at a time.
# make check    Check format, lint, types, import order and known vulnerabilities of dependencies.
# make package  Build the wheel, install it into empty environments, and serve a bundle from it.
# make soak     Run the long robustness tests behind docs/reliability.md (about an hour).
# make bench    Measure latency, load and accuracy: build/benchmarks/RESULTS.md and plots.
# make engines BUNDLE=artifacts/NAME
#               Build TensorRT engines inside the Triton container that will serve them.
# make clean    Delete artifacts/ and build/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := build/demo
RESULTS := build/benchmarks
# Versions of the TensorRT Python API to test against; installed without the native libraries.
TENSORRT_APIS := 10.16.1.11 11.4.0.106
# --no-compile saves a minute: most modules are never imported. Unset PYTHONDONTWRITEBYTECODE, so that
# imported modules are compiled once and not by every process.
unexport PYTHONDONTWRITEBYTECODE
PIP := --quiet --disable-pip-version-check --no-compile

.PHONY: setup demo test robustness wording package check soak bench engines clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"expected Python 3.11 or 3.12, found {sys.version.split()[0]}; choose another with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP) -c constraints.txt -e '.[dev]'
	for version in $(TENSORRT_APIS); do \
	  test -d .venv/tensorrt-bindings/$$version || $(BIN)/python -m pip install $(PIP) \
	    --no-deps --target .venv/tensorrt-bindings/$$version tensorrt_cu13_bindings==$$version || exit 1; \
	done
	test -x .venv/perf_analyzer/bin/perf_analyzer || $(BIN)/python -m pip install $(PIP) \
	  --no-deps --target .venv/perf_analyzer tritonclient==2.50.0
	touch $@

$(DEMO)/%/labels.txt: | setup
	rm -rf $(DEMO)/$*
	$(BIN)/python -m training pictures $(DEMO)/$* --count $(COUNT) --seed $(SEED)

$(DEMO)/calibration/labels.txt: COUNT = 900
$(DEMO)/calibration/labels.txt: SEED = 1
$(DEMO)/pictures/labels.txt: COUNT = 240
$(DEMO)/pictures/labels.txt: SEED = 2

$(DEMO)/test/labels.txt: COUNT = 800
$(DEMO)/test/labels.txt: SEED = 3

EXPORT_SHAPES = $(BIN)/python -m export assets/shapes-clip --output artifacts/shapes-clip \
	  --calibration $(DEMO)/calibration --captions $(DEMO)/calibration/captions.txt \
	  --labelled $(DEMO)/calibration

demo: setup $(DEMO)/calibration/labels.txt $(DEMO)/pictures/labels.txt
	$(EXPORT_SHAPES)
	$(BIN)/python -m serving demo artifacts/shapes-clip $(DEMO)/pictures \
	  --labels $(DEMO)/pictures/labels.txt --sheet $(DEMO)/contact_sheet.png \
	  --query 'a red circle' --query 'a green heart' --query 'a blue arrow' \
	  --query 'a white star next to a purple moon'

# --max-worker-restart=0: when a worker process dies, xdist (3.8) would otherwise wait forever for its
# test files.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 \
	  tests/unit tests/integration

# One process: these tests measure latencies, and compare the memory of processes.
robustness: setup
	$(BIN)/python -m pytest tests/robustness --ignore=tests/robustness/test_wording.py

# Runs many tests a second time, with every error worded in capital letters. Takes about 6 minutes.
wording: setup
	$(BIN)/python -m pytest tests/robustness/test_wording.py

# Requires access to a package index.
package: setup
	$(BIN)/python -m pytest tests/packaging

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	.ci/audit

# CLIP_SOAK=1 selects the long versions of these tests; they print their measurements at the end.
soak: setup
	CLIP_SOAK=1 $(BIN)/python -m pytest tests/robustness tests/integration/test_limits.py \
	  tests/integration/test_retry.py tests/integration/test_tls.py \
	  tests/integration/test_zero_shot.py tests/unit/serving/bundles/test_artifacts.py \
	  tests/unit/export/engines/test_rtx_builds.py

artifacts/random-ViT-B-32/manifest.json: | setup
	$(BIN)/python -m export random:ViT-B-32 --precision fp32 --precision int8

artifacts/shapes-clip/manifest.json: | setup $(DEMO)/calibration/labels.txt
	$(EXPORT_SHAPES)

# Run on an idle machine. `make bench RESULTS=benchmarks/results/NAME OPTIONS=--full` measures every
# batch size and runner.
bench: setup
	$(MAKE) --jobs=2 artifacts/random-ViT-B-32/manifest.json artifacts/shapes-clip/manifest.json $(DEMO)/test/labels.txt
	$(BIN)/python -m benchmarks latency artifacts/random-ViT-B-32 --output $(RESULTS) $(OPTIONS)
	$(BIN)/python -m benchmarks load artifacts/random-ViT-B-32 --quick --output $(RESULTS)
	$(BIN)/python -m benchmarks accuracy artifacts/shapes-clip $(DEMO)/test --output $(RESULTS)
	$(BIN)/python -m benchmarks report $(RESULTS)

TRITON ?= nvcr.io/nvidia/tritonserver:26.07-py3

engines:
	test -f '$(BUNDLE)/manifest.json' || { echo 'expected the directory of a bundle; run make engines BUNDLE=artifacts/NAME'; exit 2; }
	docker run --rm --gpus all -v '$(CURDIR):/work' -w /work '$(TRITON)' \
	  sh export/engines/in_container.sh '$(BUNDLE)' $(OPTIONS)

clean:
	rm -rf artifacts build
