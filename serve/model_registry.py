"""The models of one server by name: loaded, leased to requests, replaced without dropping one.

    loading  ->  ready  ->  (reload, if its files changed: a second generation loads beside the first)  ->  ready
       `-> the process ends, if it is the first load; after a reload that failed, the old one goes on

A request leases the generation that is current when it arrives and keeps it to its end; a replaced generation
is closed when its last lease is back. Knows `TextModel`, nothing of HTTP or of artifacts.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import HeadraceError, InvalidSetting, ModelNotFound, Unavailable
from runtime.machine.freed_memory import give_back_freed
from runtime.text_model import TextModel
from serve.fields.checks import shown
from serve.observe.engine_metrics import ServerMetrics

log = logging.getLogger(__name__)

OpenModel = Callable[[ServerMetrics], TextModel]
"""Opens a model that is not started; the metrics are to be its observer."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """How to open a model, and what tells whether the files behind it have changed since.

    read_stamp: anything that compares equal while they are the same. It may raise HeadraceError.
    """

    open_model: OpenModel
    read_stamp: Callable[[], object] | None = None


class Generation:
    """One loading of one model, and how many requests use it."""

    def __init__(self, model: TextModel, created: int, stamp: object = None) -> None:
        self.model = model
        self.created = created
        self.stamp = stamp
        self.num_leases = 0


class ServedModel:
    """A name, how to open what is behind it, and the generation that is current."""

    def __init__(self, name: str, source: ModelSource, metrics: ServerMetrics) -> None:
        self.name = name
        self.source = source
        self.metrics = metrics
        self.current: Generation | None = None

    @property
    def model(self) -> TextModel | None:
        """The current generation's model, None before the first is loaded."""
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

    `aliases` are further names, each NAME for the default model or NAME=MODEL; with `takes_any_name` the default model
    answers to every name that no other has. Raises InvalidSetting for an alias of no model, or of a name that is taken.
    """

    def __init__(
        self, sources: Mapping[str, ModelSource], *, aliases: Iterable[str] = (), takes_any_name: bool = False
    ) -> None:
        assert sources
        self.aliases = _read_aliases(aliases, list(sources))
        self.takes_any_name = takes_any_name
        self.served = {name: ServedModel(name, source, ServerMetrics()) for name, source in sources.items()}
        self._changed = threading.Condition()
        self._reloading = threading.Lock()
        self._is_closing = False

    @classmethod
    def of_one(cls, model: TextModel, metrics: ServerMetrics | None = None, **names: Any) -> "ModelRegistry":
        """A registry of one model that is loaded and started already; `metrics` is the observer it was given, `names`
        are the keyword arguments of the constructor."""
        registry = cls({model.name: ModelSource(lambda _: model)}, **names)
        served = registry.served[model.name]
        served.metrics = metrics or served.metrics
        served.current = Generation(model, int(time.time()))
        return registry

    @property
    def default(self) -> ServedModel:
        """The first one that was named."""
        return next(iter(self.served.values()))

    def find(self, name: str) -> ServedModel:
        """The model of a name or an alias. Raises ModelNotFound with the names there are."""
        served = self.served.get(self.aliases.get(name, name))
        if served is not None:
            return served
        if self.takes_any_name:
            return self.default
        names = ", ".join(map(shown, (*self.served, *self.aliases)))
        raise ModelNotFound(
            f"this server has no model {shown(name)}; it serves {names}; started with --alias NAME or "
            "--any-model-name it answers to other names, too",
            param="model",
        )

    def lease(self, name: str) -> Generation:
        """The current generation of a model, which stays open until it is released.

        Raises ModelNotFound, or Unavailable while it loads.
        """
        served = self.find(name)
        with self._changed:
            if served.current is None:
                raise Unavailable(f"the model {name} is still loading; try again later")
            served.current.num_leases += 1
            return served.current

    def release(self, generation: Generation) -> None:
        """Give a lease back."""
        with self._changed:
            generation.num_leases -= 1
            self._changed.notify_all()

    def load(self) -> None:
        """Open and start every model, one after another. Raises what opening raises."""
        for served in self.served.values():
            self._replace(served)

    def reload(self) -> bool:
        """Open every model whose files changed, and put it in the place of the old one; False if one could not be.

        A model that is the same stays, with its caches: a reload is also how keys are read again. A second call while
        one is under way waits for it: what changed meanwhile is to be read too.
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
        log.warning("reload: %s is new", served.name)
        return True

    def _has_changed(self, served: ServedModel) -> bool:
        """Whether the files are others than those that were loaded; an engine that failed counts as changed."""
        current, read_stamp = served.current, served.source.read_stamp
        if current is None or current.model.failure is not None or read_stamp is None:
            return True
        return read_stamp() != current.stamp

    def _replace(self, served: ServedModel) -> None:
        # Before it is opened: a change meanwhile is found by the next reload.
        stamp = None if served.source.read_stamp is None else served.source.read_stamp()
        model = served.source.open_model(served.metrics)
        model.start()
        with self._changed:
            if self._is_closing:
                model.close()
                return
            old, served.current = served.current, Generation(model, int(time.time()), stamp)
        if old is not None:
            # Not here: the next model need not wait for the slowest request of the last.
            threading.Thread(target=self._retire, args=(old,), name=f"retire {served.name}", daemon=True).start()

    def _retire(self, old: Generation) -> None:
        with self._changed:
            self._changed.wait_for(lambda: old.num_leases == 0 or self._is_closing)
        old.model.close()
        # What a closed model leaves in the heap is hundreds of megabytes, and its successor is loaded already.
        give_back_freed()

    def drain(self, timeout_s: float) -> bool:
        """Stop accepting everywhere, wait for what runs, cancel the rest. True if nothing was cancelled."""
        deadline = time.monotonic() + timeout_s
        results: list[bool] = []
        models = self.loaded()
        # Together: a model that is to be waited for must not leave the next one accepting.
        threads = [
            threading.Thread(target=lambda m=model: results.append(m.drain(max(0.0, deadline - time.monotonic()))))
            for model in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return all(results)

    def loaded(self) -> list[TextModel]:
        """The current model of every name that has one."""
        return [served.model for served in self.served.values() if served.model is not None]

    def close(self) -> None:
        """Close every model, and the replaced ones that are still leased. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for model in self.loaded():
            model.close()

    def statuses(self) -> dict[str, str]:
        """The status of every model by its name."""
        return {name: served.status for name, served in self.served.items()}

    def failures(self) -> Iterable[str]:
        """Why engines died, if any did."""
        return [model.failure for model in self.loaded() if model.failure is not None]

    def metrics_and_stats(self) -> list[tuple[str, ServerMetrics, Any]]:
        """Per model: name, metrics and the engine's stats, None before it is loaded."""
        return [
            (name, served.metrics, served.model.stats() if served.model is not None else None)
            for name, served in self.served.items()
        ]


def _read_aliases(words: Iterable[str], names: list[str]) -> dict[str, str]:
    """Model names by alias."""
    aliases: dict[str, str] = {}
    for word in words:
        alias, sign, name = word.partition("=")
        name = name if sign else names[0]
        if not alias or name not in names:
            raise InvalidSetting(
                f"--alias must be NAME or NAME=MODEL, with a MODEL of {', '.join(map(repr, names))}; got {word!r}"
            )
        if alias in names or alias in aliases:
            raise InvalidSetting(f"--alias {word!r}: the name {alias!r} is taken; give another one")
        aliases[alias] = name
    return aliases
