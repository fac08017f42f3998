"""Training of CLIP checkpoints, on drawn demo data or on a directory of captioned images."""

import serving  # noqa: F401  turns off the telemetry of libraries before they are imported
