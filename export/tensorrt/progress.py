"""Turns TensorRT's progress callbacks into whole per cents of a build.

Phases are nested, each with a number of steps; a phase counts as a part of its parent's current step. The library
calls from C++, where an exception would end the process: Ctrl-C is kept, and the library is asked to stop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Phase:
    parent: str | None
    num_steps: int
    num_done: int = 0


class Monitor:
    """The callbacks of an IProgressMonitor. `advance` gets the per cents that were gained, never less than one.

    stopped: the exception that a callback raised; the caller raises it again when the library has returned
    """

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance = advance
        self._running: dict[str, _Phase] = {}  # in order of their start
        self._shown = 0
        self.stopped: BaseException | None = None

    def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
        with self._keeping_errors():
            self._running[name] = _Phase(parent, max(1, num_steps))

    def step_complete(self, name: str, step: int) -> bool:
        """Note that a step, counted from 0, is done. False asks the library to stop."""
        with self._keeping_errors():
            if name in self._running:
                self._running[name].num_done = min(self._running[name].num_steps, step + 1)
            gained = int(100 * self._share(None)) - self._shown
            if gained > 0:
                self._shown += gained
                self._advance(gained)
        return self.stopped is None

    def phase_finish(self, name: str) -> None:
        with self._keeping_errors():
            self._running.pop(name, None)

    def _share(self, parent: str | None) -> float:
        """The finished share of the latest phase within `parent`, 0 to 1."""
        for name, phase in reversed(self._running.items()):
            if phase.parent == parent:
                return min(1.0, (phase.num_done + self._share(name)) / phase.num_steps)
        return 0.0

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
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
