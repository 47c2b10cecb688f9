"""Every error a user can cause, as one tree.

    HeadraceError                    exit code 2; HTTP status from serve/access/errors.py
    |- InvalidRequest                a request field or prompt that cannot be served (400)
    |  |- PromptTooLong              prompt plus max_tokens exceed the context (400)
    |  |- UnsupportedField           a request field that asks for what this server does not do (400)
    |  |- UnknownField               a request field that no server is known to have, under --strict-fields (400)
    |  `- ModelNotFound              the request names another model (404)
    |- Overloaded                    the waiting queue is full (429, Retry-After)
    |- Unavailable                   starting, draining or broken (503, Retry-After)
    |  `- DeviceFailed               the GPU or its library broke while running (503)
    |     `- DeviceOutOfMemory       an allocation on the device failed; the message gives both sizes
    |- DeviceUnavailable             a backend that cannot run on this machine: no GPU, driver or package for it
    |- TimedOut                      the request's own time was up before it was finished (504)
    |- EngineFailed                  the engine died while the request was in it (500)
    |- InvalidArtifact               a directory that is not a whole, intact artifact
    |  `- InvalidPlan              a TensorRT engine that is truncated, stale, or for another GPU or version
    |- PlanBuildFailed             TensorRT gave no engine, or a network without what the graph has
    |- InvalidCheckpoint             a model directory or file that cannot be read
    |  `- UnsupportedModel           a model type or config field this release has no graph for
    |- GateFailed                    the exported model is not accurate enough
    |- CalibrationFailed             activations or statistics that cannot be calibrated on
    `- InvalidSetting                a command-line flag or environment variable
Anything else that escapes is a bug of ours and keeps its traceback.
"""


class HeadraceError(Exception):
    """Base of everything a user can cause. The message is one line and says what to do."""


class InvalidRequest(HeadraceError):
    """A request that can never be served. `param` names the offending field, if one does."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the context; the message gives both lengths."""


class UnsupportedField(InvalidRequest):
    """A request field, or a kind of it, that cannot be honoured: the answer would not be what was asked for."""


class UnknownField(InvalidRequest):
    """A request field that is in no table, where such fields are refused."""


class ModelNotFound(InvalidRequest):
    """The request names a model this server does not serve."""


class Overloaded(HeadraceError):
    """The waiting queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(HeadraceError):
    """The engine is not accepting requests: starting, draining or failed."""


class DeviceFailed(Unavailable):
    """CUDA or TensorRT reported an error; what ran is lost."""


class DeviceOutOfMemory(DeviceFailed):
    """The device has not the memory that was asked for; the message says what for."""


class DeviceUnavailable(HeadraceError):
    """A backend cannot be used here. The message names what is missing and what to install."""


class TimedOut(HeadraceError):
    """The request was not finished within its own time limit."""


class EngineFailed(HeadraceError):
    """The engine stopped while this request was waiting or running."""


class InvalidArtifact(HeadraceError):
    """Not an artifact, half an artifact, or one whose files do not match its manifest."""


class InvalidPlan(InvalidArtifact):
    """A TensorRT engine that is truncated, built from another export, or for another GPU or library version."""


class PlanBuildFailed(HeadraceError):
    """TensorRT refused the graph, dropped a part of it, or gave no engine."""


class InvalidCheckpoint(HeadraceError):
    """A checkpoint that is missing, truncated or inconsistent."""


class UnsupportedModel(InvalidCheckpoint):
    """A model type or config field this release has no graph for."""


class GateFailed(HeadraceError):
    """The exported model is further from its reference than the gate allows."""


class CalibrationFailed(HeadraceError):
    """The model's activations, or a calibration file, cannot be used to choose ranges."""


class InvalidSetting(HeadraceError):
    """A malformed command-line flag or environment variable."""
