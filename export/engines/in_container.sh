#!/bin/sh
# Build the engines of a bundle inside the Triton container that will serve them, so that the same
# GPU and the same TensorRT version build and load them. `make engines BUNDLE=artifacts/NAME` runs
# this script; its arguments are those of `python -m export engine`.
#
# The container has TensorRT's libraries but not its Python bindings. The script installs the
# bindings of the same version as the libraries.
set -eu
version=$(python3 -c '
import ctypes, sys
for major in (11, 10):
    try:
        library = ctypes.CDLL(f"libnvinfer.so.{major}")
    except OSError:
        continue
    number = library.getInferLibVersion()  # major * 10000 + minor * 100 + patch
    sys.exit(print(f"{number // 10000}.{number // 100 % 100}.{number % 100}"))
sys.exit("no libnvinfer.so.10 or .11 found; run this in a Triton or TensorRT container")
')
cuda=$(python3 -c '
import ctypes
version = ctypes.c_int()
ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
print(version.value // 1000)
')
python3 -m pip install --quiet --break-system-packages \
    -e . onnxruntime "cuda-bindings==$cuda.*" "tensorrt_cu${cuda}_bindings==$version.*"
exec python3 -m export engine "$@"
