"""Which backend runs a model: TensorRT, ONNX Runtime on CUDA, or ONNX Runtime on the CPU.

`auto` tries them in that order and logs why one is passed over. What a backend needs is imported when it is tried.
"""

import logging
from collections.abc import Callable, Mapping

from runtime.artifact.manifest import Artifact
from runtime.artifact.plan_files import TARGETS, EngineFile, find_engine
from runtime.backends.cuda.cuda import Cuda, load_cuda
from runtime.backends.environment import Environment
from runtime.backends.tensorrt.library import TrtLibrary, open_library
from runtime.errors import DeviceUnavailable, HeadraceError, InvalidEngine, InvalidSetting
from runtime.machine.memory import ALONE, default_budget, plan_slots
from runtime.session.session import Session, SessionInfo
from runtime.settings import EngineSettings, share_of

log = logging.getLogger(__name__)

Backend = Callable[[Artifact, EngineSettings], Session]


def open_session(
    artifact: Artifact,
    settings: EngineSettings,
    *,
    backends: Mapping[str, Backend] | None = None,
    environment: Environment | None = None,
) -> Session:
    """Open an artifact on the device the settings name, or on the first that works.

    backends: by name, in the order `auto` tries them
    Raises what the backend raises: InvalidArtifact, InvalidSetting, DeviceUnavailable, DeviceFailed; for `auto`, what
    the last one raises.
    """
    backends = BACKENDS if backends is None else backends
    if settings.device != "auto":
        return backends[settings.device](artifact, settings)
    names = list(backends)
    if not (environment or Environment()).has_nvidia_device:
        log.info("no NVIDIA device here: serving on the CPU")
        names = names[-1:]
    for name in names[:-1]:
        try:
            return backends[name](artifact, settings)
        except HeadraceError as error:
            log.warning("not serving on %s: %s", name, error)
    return backends[names[-1]](artifact, settings)


def check_speculation(artifact: Artifact, settings: EngineSettings, info: SessionInfo | None = None) -> None:
    """InvalidSetting if --speculate or --draft would do nothing: with an int8 cache, or on the device that was chosen.

    info: of the session that was opened; None before, when only the cache's type is known
    """
    flag = "--draft" if settings.draft is not None else "--speculate"
    if not settings.speculate and settings.draft is None:
        return
    if artifact.manifest.kv.dtype == "int8" and settings.device in ("auto", "cpu"):
        raise InvalidSetting(
            f"{flag} does nothing for {artifact.path}, whose KV cache is in 8 bits: a token's logits depend on how its "
            f"run is cut there, and drafts would change answers; leave {flag} out, or export without --kv int8"
        )
    if info is not None and not (info.is_ragged and info.is_cut_exact):
        raise InvalidSetting(
            f"{flag} does nothing on {info.device}, where a token's logits depend on how its run is cut, and drafts "
            f"would change answers; leave {flag} out, or say --device cpu"
        )


def open_on_tensorrt(
    artifact: Artifact,
    settings: EngineSettings,
    *,
    open_cuda: Callable[[], Cuda] = load_cuda,
    open_trt: Callable[[str], TrtLibrary] = open_library,
) -> Session:
    """The first installed TensorRT library for which the artifact has an engine for this GPU."""
    from runtime.backends.tensorrt.session import TrtSession

    if not {"trt", "trt-plain"} & set(artifact.manifest.dialects):
        raise InvalidEngine(
            f"{artifact.path} has no graph for TensorRT; export it with --dialect ort,standard and build an engine"
        )
    cuda = open_cuda()
    try:
        library, engine = _find_engine(artifact, cuda, open_trt)
        capacity = _check_limits(artifact, settings, engine)
    except BaseException:
        cuda.close()
        raise
    return TrtSession.open(
        artifact,
        engine,
        library=library,
        cuda=cuda,
        max_batch=settings.max_batch,
        capacity=capacity,
        kv_memory=settings.kv_memory,
        share=share_of(settings) or ALONE,
    )


def _find_engine(
    artifact: Artifact, cuda: Cuda, open_trt: Callable[[str], TrtLibrary]
) -> tuple[TrtLibrary, EngineFile]:
    gpu, device = cuda.capability(), cuda.device_name()
    problems = []
    for target in TARGETS:
        try:
            library = open_trt(target)
            return library, find_engine(artifact, target=target, version=library.version, gpu=gpu, device=device)
        except HeadraceError as error:
            problems.append(str(error))
    raise DeviceUnavailable("; ".join(problems))


def _check_limits(artifact: Artifact, settings: EngineSettings, engine: EngineFile) -> int:
    """Tokens of a slot; InvalidSetting if chunks are longer than the engine takes."""
    assert engine.info is not None
    if settings.prefill_chunk > engine.info.prefill_chunk:
        raise InvalidSetting(
            f"--prefill-chunk {settings.prefill_chunk} is beyond the {engine.info.prefill_chunk} tokens that "
            f"{engine.info.stem} was built for; lower it, or build an engine with a larger --prefill-chunk"
        )
    return settings.max_len or min(artifact.manifest.dims.max_len, engine.info.max_len)


def open_on_cuda(artifact: Artifact, settings: EngineSettings, *, open_cuda: Callable[[], Cuda] = load_cuda) -> Session:
    """ONNX Runtime's CUDA provider, the KV cache in device memory."""
    from runtime.backends.ort.cuda_session import OrtDeviceSession, load_graph

    cuda = open_cuda()
    try:
        graph = load_graph(artifact, "cuda")
        budget = (share_of(settings) or ALONE).of_device(cuda.free_memory())
        num_slots, capacity = _slots(artifact, settings, budget)
        return OrtDeviceSession(graph, artifact, "cuda", cuda, num_slots=num_slots, capacity=capacity)
    except BaseException:
        cuda.close()
        raise


def open_on_cpu(artifact: Artifact, settings: EngineSettings) -> Session:
    """ONNX Runtime's CPU provider, with as many slots as memory has room for."""
    from runtime.backends.ort.cpu_session import OrtSession

    budget = 0
    if settings.kv_memory is None:
        share = share_of(settings)
        budget = default_budget(weight_bytes=artifact.weight_bytes) if share is None else share.host_kv
    num_slots, capacity = _slots(artifact, settings, budget)
    return OrtSession.open(
        artifact,
        num_slots=num_slots,
        capacity=capacity,
        threads=settings.threads,
        is_run_exact=artifact.manifest.kv.dtype != "int8" and (settings.speculate or settings.draft is not None),
    )


def _slots(artifact: Artifact, settings: EngineSettings, budget: int) -> tuple[int, int]:
    """How many slots of how many tokens ONNX Runtime gets, within --kv-memory or else `budget` bytes."""
    capacity = settings.max_len or artifact.manifest.dims.max_len
    num_slots = plan_slots(
        max_batch=settings.max_batch,
        capacity=capacity,
        bytes_per_token=artifact.kv_bytes_per_token,
        budget=budget if settings.kv_memory is None else settings.kv_memory,
    )
    return num_slots, capacity


BACKENDS: Mapping[str, Backend] = {"tensorrt": open_on_tensorrt, "cuda": open_on_cuda, "cpu": open_on_cpu}
