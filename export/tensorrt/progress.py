"""TensorRT's own account of a build, as whole per cents.

Phases lie in one another, each with a number of steps; a phase counts as a part of the step of its parent in which it
runs. The library calls from its own code, through which no exception may pass: Ctrl-C is kept, and told as a wish to
stop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Phase:
    parent: str | None
    num_steps: int
    num_done: int = 0


class PhaseTree:
    """How far a build is, from the phases that run now."""

    def __init__(self) -> None:
        self._running: dict[str, _Phase] = {}  # in order of their start

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        self._running[name] = _Phase(parent, max(1, num_steps))

    def step(self, name: str, step: int) -> None:
        """Note that a step, counted from 0, is done."""
        if name in self._running:
            phase = self._running[name]
            phase.num_done = min(phase.num_steps, step + 1)

    def finish(self, name: str) -> None:
        self._running.pop(name, None)

    def share(self, parent: str | None = None) -> float:
        """Of the latest phase within `parent`, or of the whole build, 0 to 1."""
        inner = [(name, phase) for name, phase in self._running.items() if phase.parent == parent]
        if not inner:
            return 0.0
        name, phase = inner[-1]
        return min(1.0, (phase.num_done + self.share(name)) / phase.num_steps)


class Monitor:
    """The callbacks of an IProgressMonitor. `advance` gets the per cents that were gained, never less than one.

    stopped: what a callback raised, to be raised again when the library has returned
    """

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._tree, self._advance = PhaseTree(), advance
        self._shown = 0
        self.stopped: BaseException | None = None

    def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
        self._guarded(lambda: self._tree.start(name, parent, num_steps))

    def step_complete(self, name: str, step: int) -> bool:
        """False asks the library to stop."""
        self._guarded(lambda: self._step(name, step))
        return self.stopped is None

    def phase_finish(self, name: str) -> None:
        self._guarded(lambda: self._tree.finish(name))

    def _step(self, name: str, step: int) -> None:
        self._tree.step(name, step)
        gained = int(100 * self._tree.share()) - self._shown
        if gained > 0:
            self._shown += gained
            self._advance(gained)

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # KeyboardInterrupt above all
            self.stopped = self.stopped or error


def progress_monitor(module: Any, monitor: Monitor) -> Any:
    """The library's own object that calls `monitor`."""

    def construct(self: Any) -> None:
        module.IProgressMonitor.__init__(self)  # pybind11 demands this call by name

    calls = {
        "phase_start": lambda _, name, parent, num_steps: monitor.phase_start(name, parent, num_steps),
        "step_complete": lambda _, name, step: monitor.step_complete(name, step),
        "phase_finish": lambda _, name: monitor.phase_finish(name),
    }
    return type("ProgressMonitor", (module.IProgressMonitor,), {"__init__": construct, **calls})()
