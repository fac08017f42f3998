"""Export of CLIP checkpoints to bundles. Of the served packages, only this one needs torch."""

import serving  # noqa: F401  turns off the telemetry of libraries before they are imported
