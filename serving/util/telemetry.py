"""Telemetry of libraries, which this project turns off.

Importing `serving` applies this module. The other packages import `serving` first, so it precedes
every library in every process: commands, Triton's Python models, and workers of Ray.
"""

import os
import sys

OFF = {
    # Sessions store events in ~/.cache/Microsoft, and send them to mobile.events.data.microsoft.com
    # after some seconds (1.31). `disable_telemetry_events()` does not prevent that.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that turn off the telemetry of ONNX Runtime, huggingface_hub and Ray."""
ABSENT = "openvino_telemetry"
"""Module that sends an event to www.google-analytics.com when `openvino` is imported (2026.4). No
variable turns it off. OpenVINO works without the module."""


def turn_off() -> None:
    """Turn off telemetry in this process, and with variables in its children.

    Variables that the user has set are kept, and so is a module that was imported before.
    """
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    modules.setdefault(ABSENT, None)  # importing it raises ModuleNotFoundError
