"""What a backend is: one object that says what it needs, which artifacts it runs, and opens them.

runtime/backends/registry.py lists them all; `--device`, `auto`, `headrace doctor` and help texts come from that list. A
backend's module imports its libraries when they are used, so that the list costs nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from runtime.backends.environment import Environment
from runtime.errors import InvalidArtifact, InvalidSetting
from runtime.machine.memory import default_budget, plan_slots
from runtime.machine.sizes import format_bytes
from runtime.settings import share_of

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.session.session import Session
    from runtime.settings import EngineSettings


class Problem(NamedTuple):
    """What keeps a backend from working, and what to type, or do, about it."""

    what: str
    fix: str


class Slots(NamedTuple):
    """The KV slots of a session, and the tokens of each."""

    num_slots: int
    capacity: int


class Backend(ABC):
    """One way to run a model.

    name: the word after --device
    summary: what it is, for help texts
    packages: the distributions that it can come from, under every name they are published as
    dialects: the graphs that it reads, the first that an artifact has
    flags: fields of EngineSettings that only some backends act on, and this one does
    runs_states: whether its slots can hold states beside K and V
    is_extra: whether most artifacts have no graph for it, so that `auto` passes over it without a warning then
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    dialects: ClassVar[tuple[str, ...]]
    flags: ClassVar[frozenset[str]] = frozenset()
    is_extra: ClassVar[bool] = False
    runs_states: ClassVar[bool] = False

    def missing_hardware(self, env: Environment) -> Problem | None:
        """Why no package could make it work on this machine; None if one could."""
        return None

    def passed_over(self, env: Environment) -> Problem | None:
        """Why `--device auto` does not try it on this machine; None if it does."""
        return self.missing_hardware(env)

    @abstractmethod
    def missing_software(self, env: Environment) -> Iterator[Problem]:
        """What has to be installed, replaced or repaired first."""

    def note(self, env: Environment) -> str:
        """Which release of which package it runs with; empty if there is none."""
        return next((f"{name} {env.packages[name]}" for name in self.packages if name in env.packages), "")

    def check(self, artifact: "Artifact") -> None:
        """InvalidArtifact if the artifact has no graph that this backend reads, or none in a precision that it runs."""
        if not set(self.dialects) & set(artifact.manifest.dialects):
            raise InvalidArtifact(
                f"{artifact.path} has no {' or '.join(self.dialects)} graph, which --device {self.name} reads; "
                f"export it with --dialect {','.join(dict.fromkeys(['ort', self.dialects[0]]))}"
            )
        if artifact.manifest.states and not self.runs_states:
            raise InvalidArtifact(
                f"{artifact.path} has layers with recurrent states, which --device {self.name} does not run; "
                "use --device cpu or native"
            )

    @abstractmethod
    def open(self, artifact: "Artifact", settings: "EngineSettings") -> "Session":
        """Load the artifact, with as many slots as the settings and the memory allow.

        InvalidArtifact, InvalidSetting, DeviceUnavailable or DeviceFailed if it cannot be.
        """


def slots_for(artifact: "Artifact", settings: "EngineSettings", budget: int) -> Slots:
    """The slots of a backend that has no limits of its own: as many as fit --kv-memory, or else `budget` bytes.

    InvalidSetting, with the sums, if not even one fits.
    """
    capacity = settings.max_len or artifact.manifest.dims.max_len
    num_slots = plan_slots(
        max_batch=settings.max_batch,
        capacity=capacity,
        bytes_per_token=artifact.kv_bytes_per_token(),
        budget=budget if settings.kv_memory is None else settings.kv_memory,
    )
    return Slots(num_slots, capacity)


LEAST_CONTEXT = 256
"""Tokens of one request for which there must be memory, unless --max-len says how many."""


class PagedSlots(NamedTuple):
    """Slots that are addresses, and the bytes that all of them together may commit."""

    num_slots: int
    capacity: int
    budget: int


def paged_slots(artifact: "Artifact", settings: "EngineSettings", dialect: str = "ort") -> PagedSlots:
    """The slots of a backend in the machine's memory: --max-batch of them, however long.

    InvalidSetting, with the sums, if there is no memory for one request: of --max-len tokens, or else of a few.
    """
    from runtime.machine.kv_pages import head_layout

    manifest = artifact.manifest
    budget = host_budget(artifact, settings) - settings.max_batch * manifest.state_bytes
    capacity = settings.max_len or manifest.dims.max_len
    layout = head_layout(
        num_layers=len(manifest.dims.kv_layers),
        num_kv_heads=manifest.dims.num_kv_heads,
        head_dim=manifest.dims.head_dim,
        dtype=manifest.kv_of(dialect).dtype,
    )
    needed, fitting = settings.max_len or min(capacity, LEAST_CONTEXT), layout.fitting_tokens(budget)
    if fitting < needed:
        lower = "" if settings.max_len is None or fitting < 2 else f"--max-len {fitting:,} or less, or "
        raise InvalidSetting(
            f"a request of {needed:,} tokens takes {format_bytes(layout.committed(needed))} of KV memory (in pages of "
            f"{layout.page_bytes // 1024} KiB) and only {format_bytes(max(0, budget))} may be used"
            f"{_beside_states(artifact, settings.max_batch)}; "
            f"set {lower}a larger --kv-memory"
        )
    return PagedSlots(settings.max_batch, capacity, budget)


def _beside_states(artifact: "Artifact", num_slots: int) -> str:
    """Words about the memory of states."""
    state_bytes = artifact.manifest.state_bytes
    return f", beside {format_bytes(state_bytes)} of states in each of {num_slots} slots" if state_bytes else ""


def host_budget(artifact: "Artifact", settings: "EngineSettings") -> int:
    """Bytes of the machine's memory for the KV cache, where --kv-memory does not say: this model's share, or most of
    what is free beside the weights."""
    if settings.kv_memory is not None:
        return settings.kv_memory
    share = share_of(settings)
    return default_budget(weight_bytes=artifact.weight_bytes) if share is None else share.host_kv
