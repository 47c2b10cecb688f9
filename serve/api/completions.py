"""POST /v1/completions: text or token ids in, text out."""

from flask import Flask, Response, request

from runtime.errors import InvalidRequest
from runtime.text_model import TextModel
from serve.api.bodies import read_json
from serve.api.context import Context, lease_model, noting_fields
from serve.api.replying import check_choices, respond, start
from serve.fields.requests import CompletionRequest, read_completion
from serve.replies.openai import CompletionShape, Echo

MAX_SCORED = 2**19
"""Most log-probabilities in a reply that scores its prompts: about 16 MB of JSON, made in 120 MB of memory. Evaluators
ask for one or two for each token, so this is enough for 128,000 tokens and more."""


def add_completions_route(app: Flask, context: Context) -> None:
    """Add the route of this module to the application."""

    @app.post("/v1/completions")
    def complete() -> Response:
        raw = read_json(request, is_logged=context.settings.log_prompts)
        model = lease_model(context, raw)
        with noting_fields(context):
            wanted = read_completion(raw)
        check_choices(context, len(wanted.prompts), wanted.n)
        most = wanted.max_prompt(model.max_len)
        whole = [
            model.encode(item, add_special_tokens=wanted.add_special_tokens, max_tokens=most)
            if isinstance(item, str)
            else list(item)
            for item in wanted.prompts
        ]
        prompts = [wanted.cut_prompt(prompt, model.max_len) for prompt in whole]
        _check_scored(wanted, prompts)
        choices = start(context, request, model, wanted, prompts)
        shape = CompletionShape(
            model,
            _echo(model, wanted, whole, prompts),
            is_scored=wanted.is_scored,
            shows_special=not wanted.params.skip_special_tokens,
        )
        return respond(choices, shape, wanted)


def _check_scored(wanted: CompletionRequest, prompts: list[list[int]]) -> None:
    """Raise InvalidRequest if the reply to a request that scores its prompts would be too large."""
    if not wanted.is_scored:
        return
    per_token = (wanted.params.logprobs or 0) + 1
    num_scored = sum(map(len, prompts)) * wanted.n * per_token
    if num_scored > MAX_SCORED:
        raise InvalidRequest(
            f"{sum(map(len, prompts)):,} prompt tokens times n={wanted.n} with {per_token} log-probabilities each are "
            f"{num_scored:,}; a reply has at most {MAX_SCORED:,}: send fewer prompts at once",
            param="logprobs",
        )


def _echo(model: TextModel, wanted: CompletionRequest, whole: list[list[int]], prompts: list[list[int]]) -> list[Echo]:
    """The prompt for each choice, if the client wants it. Token ids, and the rest of a prompt that was cut, are turned
    into text."""
    if not wanted.is_echo:
        return []
    spelled = model.token_bytes if wanted.params.skip_special_tokens else model.shown_bytes
    echoes = []
    for prompt, all_ids, ids in zip(wanted.prompts, whole, prompts, strict=True):
        if isinstance(prompt, str) and len(ids) == len(all_ids):
            text = prompt
        else:
            text = b"".join(map(spelled, ids)).decode("utf-8", "replace")
        echoes += [Echo(text, ids)] * wanted.n
    return echoes
