"""The JSON documents that commands print with `--json`, as dataclasses.

Those of `doctor` and `list` lie with what makes them: `export.doctor.report.DoctorReport`,
`export.checkpoints.architectures.KnownCheckpoints`.
"""

from dataclasses import dataclass

from serving.bundles.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedBundle:
    """`export`, `engine` and `verify`"""

    path: str
    manifest: Manifest
    """With verdicts measured on this machine by `verify`."""
