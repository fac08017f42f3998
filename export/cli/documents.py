"""JSON documents that commands print with `--json`, as dataclasses.

`doctor` prints an `export.doctor.report.DoctorReport`, `list` an
`export.checkpoints.architectures.KnownCheckpoints`.
"""

from dataclasses import dataclass

from serving.bundles.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedBundle:
    """Document printed by `export`, `engine` and `verify`."""

    path: str
    manifest: Manifest
    """Manifest of the bundle. `verify` replaces its verdicts with those of this machine."""
