"""What every view works with: the models, the settings, and the current request's model and notes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runtime.errors import InvalidRequest, PromptTooLong
from runtime.text_model import TextModel
from serve.access.middleware import Access, current_record, on_end
from serve.fields.reading import reading
from serve.model_registry import ModelRegistry
from serve.observe.http_metrics import HttpMetrics
from serve.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Context:
    """Made once for each application."""

    models: ModelRegistry
    settings: ServerSettings
    metrics: HttpMetrics
    access: Access


@contextmanager
def noting_fields(context: Context) -> Iterator[None]:
    """Read the fields of the current request inside this block. Its record gets the names of the ignored ones."""
    with reading(is_strict=context.settings.strict_fields) as notes:
        current_record().ignored = notes.ignored
        yield


@contextmanager
def errors_name(param: str) -> Iterator[None]:
    """Make errors of the prompt name the field it came from: the engine and the limits only know a prompt."""
    try:
        yield
    except InvalidRequest as error:
        if isinstance(error, PromptTooLong) or error.param == "prompt":
            error.param = param
        raise


def lease_model(context: Context, raw: dict[str, Any]) -> TextModel:
    """The model that a request names, kept open until its reply is out. Raises ModelNotFound, or Unavailable while it
    loads.

    With --any-model-name, a missing name is filled in. A name that is missing or not a string gets the default model;
    the table of fields reports the error.
    """
    name = raw.get("model")
    if name is None and context.models.takes_any_name:
        name = raw["model"] = context.models.default.name
    loaded = context.models.lease(name if isinstance(name, str) else context.models.default.name)
    on_end(lambda _: context.models.release(loaded))
    current_record().model = loaded.model.name
    return loaded.model
