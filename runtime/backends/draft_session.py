"""Opens a draft model beside its target model: checks that they fit each other, and divides the memory.

Both run on ONNX Runtime's CPU, with the native operators where they are built and in the artifact. Speculation needs
logits that do not depend on how a run is cut, bit for bit, and the other backends do not give that.
"""

from dataclasses import replace

from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.cpu import OrtCpu
from runtime.backends.ort.native import Native, has_native_graph
from runtime.errors import InvalidSetting
from runtime.machine.memory import default_budget
from runtime.session.session import Session, SessionInfo
from runtime.settings import EngineSettings, share_of
from runtime.text.tokenizer import TOKENIZER


def open_draft(path: str, target: Artifact, settings: EngineSettings) -> Artifact:
    """The draft model's artifact. InvalidSetting if it cannot draft for the target."""
    draft, capacity = open_artifact(path), settings.max_len or target.manifest.dims.max_len
    ours, its = target.manifest, draft.manifest
    if its.dims.vocab_size != ours.dims.vocab_size or its.files.get(TOKENIZER) != ours.files.get(TOKENIZER):
        raise InvalidSetting(f"--draft {path}: {its.name} has other tokens than {ours.name}; both need one tokenizer")
    if its.states:
        raise InvalidSetting(
            f"--draft {path}: {its.name} has layers with recurrent states, which cannot be taken back after a wrong "
            "draft; choose a model without them"
        )
    if its.dims.max_len < capacity:
        raise InvalidSetting(
            f"--draft {path}: {its.name} takes {its.dims.max_len:,} tokens and a slot has {capacity:,}; "
            f"set --max-len {its.dims.max_len}"
        )
    return draft


def beside_draft(settings: EngineSettings, target: Artifact, draft: Artifact) -> EngineSettings:
    """The target's settings: on the CPU, with the share of the KV memory that leaves the draft as many slots."""
    budget = settings.kv_memory
    if budget is None and (share := share_of(settings)) is not None:
        budget = share.host_kv
    if budget is None:
        budget = default_budget(weight_bytes=target.weight_bytes + draft.weight_bytes)
    is_native = settings.device != OrtCpu.name and has_native_graph(target)
    device = Native.name if is_native or settings.device == Native.name else OrtCpu.name
    ours = target.kv_bytes_per_token("native" if device == Native.name else "ort")
    its = draft.kv_bytes_per_token("native" if has_native_graph(draft) else "ort")
    return replace(settings, device=device, kv_memory=max(1, budget * ours // (ours + its)))


def open_draft_session(draft: Artifact, target: SessionInfo, settings: EngineSettings) -> Session:
    """The draft model's session, with as many slots as the target's, and as long."""
    from runtime.backends.ort.native_session import open_cpu_session

    dialect = "native" if has_native_graph(draft) else "ort"
    return open_cpu_session(
        draft, dialect, num_slots=target.num_slots, capacity=target.capacity, threads=settings.threads
    )
