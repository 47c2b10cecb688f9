"""Samples calibration text from the model itself: at temperature 1, through the engine, many rows at once.

Works on token ids; knows nothing about text.
"""

from collections.abc import Callable, Sequence

from export.calibration.dataset import Generate
from runtime.artifact.manifest import Artifact
from runtime.backends.ort.session import OrtSession
from runtime.core import Request, SamplingParams, TokenEvent
from runtime.engine.engine import Engine
from runtime.errors import EngineFailed
from runtime.machine.progress import progress_bar
from runtime.session.session import Session

# Rows decoded together: weights are read once for all of them, and a slot of 512 tokens costs 12 MB of SmolLM2-135M.
_ROWS = 32


def artifact_generator(artifact: Artifact, *, length: int) -> Generate:
    """A function that samples through its own session on `artifact`, opened and closed in each call."""

    def generate(starts: Sequence[Sequence[int]], wanted: int, seed: int) -> list[list[int]]:
        session = OrtSession.open(artifact, num_slots=min(_ROWS, len(starts)), capacity=length)
        try:
            with progress_bar("sample", total=sum(wanted - len(start) for start in starts), unit="token") as bar:
                return sample_continuations(session, starts, wanted, seed, on_token=lambda: bar.update(1))
        finally:
            session.close()

    return generate


def sample_continuations(
    session: Session,
    starts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    *,
    on_token: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Each start continued to `length` ids, past any end-of-text token, as a served model would at temperature 1.

    Sequence i uses the seed `seed + i`, so that none repeats another, and the same call gives the same ids. Raises
    EngineFailed if the engine does.
    """
    engine = Engine(session)
    continued = [list(start) for start in starts]

    def sink_of(ids: list[int]) -> Callable[[TokenEvent], None]:
        def sink(event: TokenEvent) -> None:
            if event.error is not None:
                raise EngineFailed(event.error)
            if event.token_id is not None:
                ids.append(event.token_id)
                on_token()

        return sink

    for number, (start, ids) in enumerate(zip(starts, continued, strict=True)):
        params = SamplingParams(max_tokens=length - len(start), temperature=1.0, seed=seed + number, ignore_eos=True)
        request = Request(
            request_id=str(number), prompt_ids=list(start), params=params, eos_ids=frozenset(), sink=sink_of(ids)
        )
        engine.add(engine.prepare(request))
    while engine.has_work:
        engine.step()
    return continued
