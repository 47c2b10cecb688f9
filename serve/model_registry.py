"""The models of one server by name: loaded, leased to requests, and replaced without dropping a request.

    loading  ->  ready  ->  (reload, if its files changed: the new one loads beside the old one)  ->  ready
       `-> the process ends if the first load fails; if a reload fails, the old model stays

A request leases the model that is current when the request arrives, and keeps it to the end. A replaced model is closed
when its last lease is returned. Knows `TextModel`, nothing of HTTP or of artifacts.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from runtime.errors import HeadraceError, InvalidSetting, ModelNotFound, Unavailable
from runtime.machine.freed_memory import give_back_freed
from runtime.text_model import TextModel
from serve.fields.checks import shown
from serve.observe.engine_metrics import EngineMetrics

log = logging.getLogger(__name__)

OpenModel = Callable[[EngineMetrics], TextModel]
"""Opens a model, which is not started yet. The metrics observe it."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """How to open a model, and how to see whether its files have changed.

    read_stamp: returns a value that stays equal while the files are the same. May raise HeadraceError.
    """

    open_model: OpenModel
    read_stamp: Callable[[], object] | None = None


class LoadedModel:
    """A model in memory, when and from which files it was loaded, and how many requests use it."""

    def __init__(self, model: TextModel, created: int, stamp: object = None) -> None:
        self.model = model
        self.created = created
        self.stamp = stamp
        self.num_leases = 0


class ServedModel:
    """A name, how to open its model, and the current model."""

    def __init__(self, name: str, source: ModelSource, metrics: EngineMetrics) -> None:
        self.name = name
        self.source = source
        self.metrics = metrics
        self.current: LoadedModel | None = None

    @property
    def model(self) -> TextModel | None:
        """The current model; None before the first is loaded."""
        return self.current.model if self.current is not None else None

    @property
    def status(self) -> str:
        """loading, ready, failed or draining."""
        if (model := self.model) is None:
            return "loading"
        if model.failure is not None:
            return "failed"
        return "ready" if model.is_ready else "draining"


class ModelRegistry:
    """Every model of a server. Methods may be called from any thread.

    aliases: more names, each NAME for the default model or NAME=MODEL
    takes_any_name: the default model answers to every name that no model has
    Raises InvalidSetting if an alias names no model, or is already taken.
    """

    def __init__(
        self, sources: Mapping[str, ModelSource], *, aliases: Iterable[str] = (), takes_any_name: bool = False
    ) -> None:
        assert sources
        self.aliases = _read_aliases(aliases, list(sources))
        self.takes_any_name = takes_any_name
        self.served = {name: ServedModel(name, source, EngineMetrics()) for name, source in sources.items()}
        self._changed = threading.Condition()
        self._reloading = threading.Lock()
        self._is_closing = False

    @classmethod
    def of_one(cls, model: TextModel, metrics: EngineMetrics | None = None, **names: Any) -> "ModelRegistry":
        """A registry of one model that is already started. `metrics` is its observer; `names` are arguments of the
        constructor."""
        registry = cls({model.name: ModelSource(lambda _: model)}, **names)
        served = registry.served[model.name]
        served.metrics = metrics or served.metrics
        served.current = LoadedModel(model, int(time.time()))
        return registry

    @property
    def default(self) -> ServedModel:
        """The first model on the command line."""
        return next(iter(self.served.values()))

    def find(self, name: str) -> ServedModel:
        """The model with this name or alias. Raises ModelNotFound, which lists the valid names."""
        served = self.served.get(self.aliases.get(name, name))
        if served is not None:
            return served
        if self.takes_any_name:
            return self.default
        names = ", ".join(map(shown, (*self.served, *self.aliases)))
        raise ModelNotFound(
            f"this server has no model {shown(name)}; it serves {names}; with --alias NAME or --any-model-name it "
            "answers to other names too",
            param="model",
        )

    def lease(self, name: str) -> LoadedModel:
        """The current model with this name, which stays open until `release`.

        Raises ModelNotFound, or Unavailable while it loads.
        """
        served = self.find(name)
        with self._changed:
            if served.current is None:
                raise Unavailable(f"the model {name} is still loading; try again later")
            served.current.num_leases += 1
            return served.current

    def release(self, loaded: LoadedModel) -> None:
        """Return a lease."""
        with self._changed:
            loaded.num_leases -= 1
            self._changed.notify_all()

    def load(self) -> None:
        """Open and start every model, one after another. Raises what opening raises."""
        for served in self.served.values():
            self._replace(served)

    def reload(self) -> bool:
        """Replace every model whose files changed. False if one could not be opened; then the old one stays.

        An unchanged model stays with its caches, because keys are reread by a reload too. A second call waits for the
        first and then reads what has changed since.
        """
        with self._reloading:
            results = [self._try_replace(served) for served in self.served.values()]
        return all(results)

    def _try_replace(self, served: ServedModel) -> bool:
        try:
            if not self._has_changed(served):
                log.warning("reload: %s is unchanged", served.name)
                return True
            self._replace(served)
        except HeadraceError as error:
            log.error("reload: %s stays as it was: %s", served.name, error)
            return False
        log.warning("reload: %s was replaced", served.name)
        return True

    def _has_changed(self, served: ServedModel) -> bool:
        """Whether the files differ from those that were loaded. A failed engine counts as changed."""
        current, read_stamp = served.current, served.source.read_stamp
        if current is None or current.model.failure is not None or read_stamp is None:
            return True
        return read_stamp() != current.stamp

    def _replace(self, served: ServedModel) -> None:
        # Read before the files are opened, so that the next reload notices a change made meanwhile.
        stamp = None if served.source.read_stamp is None else served.source.read_stamp()
        model = served.source.open_model(served.metrics)
        model.start()
        with self._changed:
            if self._is_closing:
                model.close()
                return
            old, served.current = served.current, LoadedModel(model, int(time.time()), stamp)
        if old is not None:
            # In a thread: the next model need not wait for the old one's slowest request.
            threading.Thread(target=self._retire, args=(old,), name=f"retire {served.name}", daemon=True).start()

    def _retire(self, old: LoadedModel) -> None:
        with self._changed:
            self._changed.wait_for(lambda: old.num_leases == 0 or self._is_closing)
        old.model.close()
        # A closed model leaves hundreds of megabytes free in the heap, and its successor is already loaded.
        give_back_freed()

    def drain(self, timeout_s: float) -> bool:
        """Stop accepting requests, wait for the running ones, cancel the rest. True if nothing was cancelled."""
        models = self.loaded()
        # All at once: while one model is waited for, the others must not accept requests.
        with ThreadPoolExecutor(max(1, len(models))) as pool:
            return all(list(pool.map(lambda model: model.drain(timeout_s), models)))

    def loaded(self) -> list[TextModel]:
        """The current model of every name that has one."""
        return [served.model for served in self.served.values() if served.model is not None]

    def close(self) -> None:
        """Close every model, including replaced ones that are still leased. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for model in self.loaded():
            model.close()

    def statuses(self) -> dict[str, str]:
        """The status of every model by its name."""
        return {name: served.status for name, served in self.served.items()}

    def failures(self) -> list[str]:
        """Why engines have failed."""
        return [model.failure for model in self.loaded() if model.failure is not None]

    def metrics_and_stats(self) -> list[tuple[str, EngineMetrics, Any]]:
        """For each model: name, metrics and the engine's stats (None before it is loaded)."""
        return [
            (name, served.metrics, served.model.stats() if served.model is not None else None)
            for name, served in self.served.items()
        ]


def _read_aliases(words: Iterable[str], names: list[str]) -> dict[str, str]:
    """Model names by alias. Raises InvalidSetting."""
    aliases: dict[str, str] = {}
    for word in words:
        alias, sign, name = word.partition("=")
        name = name if sign else names[0]
        if not alias or name not in names:
            raise InvalidSetting(
                f"--alias must be NAME or NAME=MODEL, where MODEL is {' or '.join(map(repr, names))}; got {word!r}"
            )
        if alias in names or alias in aliases:
            raise InvalidSetting(f"--alias {word!r}: the name {alias!r} is taken; choose another")
        aliases[alias] = name
    return aliases
