"""Every error this project raises on purpose.

    ClipDeployError
    ├── InputError            what a user gave cannot be used; the message says what would be
    │   ├── ImageError          a picture
    │   ├── TextError           a text
    │   └── CheckpointError     a checkpoint: name, directory, weights
    ├── BundleError           a bundle is missing, incomplete, tampered with, or did not pass the gate
    ├── RunnerError           a runner cannot give the device or precision it was asked for
    └── ServerError           a Triton server: not startable, not reachable, or it refused a request

A message says what was expected, what arrived, and what to do.
"""


class ClipDeployError(Exception):
    """Base of all errors of this project; commands print it without a traceback and exit with 2."""


class InputError(ClipDeployError, ValueError):
    """What a user gave cannot be used."""


class ImageError(InputError):
    """A picture that cannot be decoded, or is not allowed to be."""


class TextError(InputError):
    """A text that cannot be tokenized."""


class CheckpointError(InputError):
    """A checkpoint that is unknown, incomplete, or not a CLIP."""


class BundleError(ClipDeployError):
    """A bundle that is missing, incomplete, tampered with, or refused by the gate."""


class RunnerError(ClipDeployError):
    """A runner that cannot give what it was asked for."""


class ServerError(ClipDeployError):
    """A Triton server that cannot be started or reached, or that refused a request."""
