"""Every backend, in the order `--device auto` tries them, and opening an artifact on one of them.

To add a backend: write a `Backend` (runtime/backends/backend.py) in a folder of its own and add it to BACKENDS. The
values of --device, help texts and `headrace doctor` follow.
"""

import argparse
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from runtime.backends.backend import Backend
from runtime.backends.environment import Environment
from runtime.backends.openvino.backend import OpenVino
from runtime.backends.ort.cpu import OrtCpu
from runtime.backends.ort.cuda import OrtCuda
from runtime.backends.ort.native import Native
from runtime.backends.tensorrt.backend import TensorRt
from runtime.errors import DeviceUnavailable, HeadraceError, InvalidSetting
from runtime.settings import EngineSettings, add_flags, flag_name, from_namespace

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.session.session import Session, SessionInfo

log = logging.getLogger(__name__)

AUTO = "auto"
BACKENDS: Sequence[Backend] = (TensorRt(), OrtCuda(), Native(), OrtCpu(), OpenVino())
"""GPUs first. OpenVINO last: it is slower than ONNX Runtime for a request alone, and nothing is speculated on it."""


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """Add --device, whose values are the backends' names."""
    names = ", ".join(backend.name for backend in BACKENDS)
    parser.add_argument(
        "--device",
        type=device_name,
        default=AUTO,
        help=f"what runs the model: {names}, or auto, the first of them that works (default: auto)",
    )


def add_engine_flags(parser: argparse._ActionsContainer, *, skip: Collection[str] = ()) -> None:
    """Add a flag for every engine setting but those in `skip`."""
    add_device_flag(parser)
    add_flags(parser, EngineSettings, skip={"device", *skip})


def engine_settings(args: argparse.Namespace, **fixed: Any) -> EngineSettings:
    """The settings that these flags and `fixed` values give. InvalidSetting if one is wrong or would have no effect."""
    settings = from_namespace(EngineSettings, args, **fixed)
    check_settings(settings)
    return settings


def device_name(text: str) -> str:
    """A value of --device. InvalidSetting lists what there is."""
    if text != AUTO:
        backend_named(text, "--device", AUTO)
    return text


def backend_named(name: str, flag: str, *others: str, backends: Sequence[Backend] = BACKENDS) -> Backend:
    """The backend that a flag names. InvalidSetting lists what there is, `others` among it."""
    found = next((backend for backend in backends if backend.name == name), None)
    if found is None:
        names = ", ".join((*others, *(backend.name for backend in backends)))
        raise InvalidSetting(f"{flag} must be one of {names}, got {name!r}")
    return found


def check_settings(settings: EngineSettings) -> None:
    """InvalidSetting if the device is unknown, or a flag is given on which the named device does not act.

    With `auto` such a flag is judged once a device is chosen.
    """
    if device_name(settings.device) == AUTO:
        return
    for name in sorted(frozenset[str]().union(*(backend.flags for backend in BACKENDS))):
        able = [backend.name for backend in BACKENDS if name in backend.flags]
        if getattr(settings, name) and settings.device not in able:
            raise InvalidSetting(
                f"{flag_name(name)} works on --device {' or '.join(able)} alone, and --device says {settings.device}; "
                "leave one of the two out"
            )


def check_speculation(artifact: "Artifact", settings: EngineSettings, info: "SessionInfo | None" = None) -> None:
    """InvalidSetting if --speculate or --draft would do nothing: with an int8 cache, for a model with states, or on the
    device that was chosen.

    info: of the session that was opened; None before, when only the cache's type is known
    """
    flag = "--draft" if settings.draft is not None else "--speculate"
    if not settings.speculate and settings.draft is None:
        return
    if artifact.manifest.kv.dtype == "int8":
        raise InvalidSetting(
            f"{flag} does nothing for {artifact.path}, whose KV cache is in 8 bits: a token's logits depend on how its "
            f"run is cut there, and drafts would change answers; leave {flag} out, or export without --kv int8"
        )
    if artifact.manifest.states:
        raise InvalidSetting(
            f"{flag} does nothing for {artifact.path}, whose layers have recurrent states: they cannot be taken back "
            f"after a wrong draft; leave {flag} out"
        )
    if info is not None and not (info.is_ragged and info.is_cut_exact):
        raise InvalidSetting(
            f"{flag} does nothing on {info.device}, where a token's logits depend on how its run is cut, and drafts "
            f"would change answers; leave {flag} out, or say --device cpu"
        )


def open_session(
    artifact: "Artifact",
    settings: EngineSettings,
    *,
    backends: Sequence[Backend] = BACKENDS,
    environment: Environment | None = None,
) -> "Session":
    """Open an artifact on the device that the settings name; with `auto`, on the first backend that works.

    `auto` passes over what cannot work, like a GPU's backend without a GPU, and tries the others in order; the log says
    why each was left.
    Raises what the backend raises: InvalidArtifact, InvalidSetting, DeviceUnavailable, DeviceFailed; for `auto`, what
    the last one raises.
    """
    check_settings(settings)
    if settings.device != AUTO:
        return _opened(backend_named(settings.device, "--device", backends=backends), artifact, settings)
    candidates = list(_worth_trying(backends, environment or Environment()))
    if not candidates:
        raise DeviceUnavailable("no backend can work on this machine; `headrace doctor` says why")
    for backend in candidates[:-1]:
        try:
            return _opened(backend, artifact, settings)
        except HeadraceError as error:
            lacks_graph = not set(backend.dialects) & set(artifact.manifest.dialects)
            level = logging.INFO if backend.is_extra and lacks_graph else logging.WARNING
            log.log(level, "not serving on %s: %s", backend.name, error)
    return _opened(candidates[-1], artifact, settings)


def _worth_trying(backends: Sequence[Backend], env: Environment) -> Iterator[Backend]:
    for backend in backends:
        if (problem := backend.passed_over(env)) is None:
            yield backend
        else:
            log.info("not serving on %s: %s", backend.name, problem.what)


def _opened(backend: Backend, artifact: "Artifact", settings: EngineSettings) -> "Session":
    backend.check(artifact)
    return backend.open(artifact, settings)
