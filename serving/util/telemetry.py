"""Telemetry of libraries, which this project turns off.

Importing `serving` applies this module. The other packages import `serving` first, so it precedes
every library in every process: commands, Triton's Python models, and workers of Ray.
"""

import os

OFF = {
    # Sessions store events in ~/.cache/Microsoft, and send them to mobile.events.data.microsoft.com
    # after some seconds (1.31). `disable_telemetry_events()` does not prevent that.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that turn off the telemetry of ONNX Runtime, huggingface_hub and Ray."""


def turn_off() -> None:
    """Set the variables of `OFF` in this process and its children; values of the user are kept."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
