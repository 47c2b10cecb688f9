"""A second, smaller model that drafts the next tokens of requests: the most likely ones, a run for each.

It has slots of its own, which requests get with their first draft. Its cache lags behind a request's text: new tokens
are run when the next draft is due. A whole prompt is run in chunks, one a step, so that it holds up no other request. A
wrong token costs only time, so nothing here need be exact.
"""

import time
from collections.abc import Sequence

import numpy as np

from runtime.engine.kv_slots import KEEP_S, KvSlots
from runtime.engine.sequence import LiveSequence
from runtime.engine.speculation.draft_state import MAX_DRAFT, state_of
from runtime.engine.speculation.running_mean import updated
from runtime.session.session import Batch, Session

MAX_LAG = MAX_DRAFT + 1
"""Most tokens of a text that are run together with a draft; a greater lag is reduced first."""


class DraftModel:
    """Drafts for requests of one engine. `session` must be ragged and as long as the engine's."""

    def __init__(self, session: Session, *, prefill_chunk: int = 128) -> None:
        assert session.info.is_ragged
        self._session = session
        self._prefill_chunk = prefill_chunk
        self._slots = KvSlots(
            session.info.num_slots, session.info.capacity, layout=session.info.layout, drop=session.drop_slot
        )
        self._owners: dict[int, LiveSequence] = {}  # in the order in which they catch up
        self._texts: list[list[int]] = [[] for _ in range(session.info.num_slots)]  # what the cache holds, by slot
        self._step_s = 0.0

    def seconds(self, num_draft: int) -> float:
        """How long it takes to draft so many tokens; 0 before it was tried."""
        return self._step_s * num_draft

    def draft(self, sequences: Sequence[LiveSequence], limits: Sequence[int]) -> list[list[int]]:
        """At most `limits` tokens for each sequence; none for one whose text is more than MAX_LAG ahead of the
        cache."""
        slots = self._slots_of(sequences)
        drafts: list[list[int]] = [[] for _ in sequences]
        ready = [
            idx for idx, slot in enumerate(slots) if limits[idx] and self._lag(slot, _text(sequences[idx])) <= MAX_LAG
        ]
        behind = {slots[idx]: idx for idx in range(len(sequences)) if limits[idx] and idx not in ready}
        if behind:
            slot = next(slot for slot in self._owners if slot in behind)
            self._owners[slot] = self._owners.pop(slot)  # its next turn is after all others'
            self._catch_up(slot, _text(sequences[behind[slot]]))
        if not ready:
            return drafts
        started_s = time.perf_counter()
        feeds = {slots[idx]: _text(sequences[idx])[len(self._texts[slots[idx]]) :] for idx in ready}
        num_steps = max(limits[idx] for idx in ready)
        for step in range(num_steps):
            best = self._run(feeds)
            for idx in ready:
                if slots[idx] in feeds:
                    drafts[idx].append(best[slots[idx]])
            feeds = {slots[idx]: drafts[idx][-1:] for idx in ready if step + 1 < limits[idx]}
        step_s = (time.perf_counter() - started_s) / num_steps
        self._step_s = updated(self._step_s or step_s, step_s)
        return drafts

    def close(self) -> None:
        """Release the model. Idempotent."""
        self._session.close()

    def _slots_of(self, sequences: Sequence[LiveSequence]) -> list[int]:
        """The slot of each sequence. Releases the slots of requests that have ended."""
        for slot, owner in list(self._owners.items()):
            if owner.slot is None:
                del self._owners[slot]
                self._texts[slot] = []
                self._slots.release(slot)
        self._slots.drop_kept(KEEP_S)
        known = {id(owner): slot for slot, owner in self._owners.items()}
        for sequence in sequences:
            if id(sequence) not in known:
                slot = known[id(sequence)] = self._slots.take()
                self._owners[slot] = sequence
        return [known[id(sequence)] for sequence in sequences]

    def _lag(self, slot: int, text: list[int]) -> int:
        """Drop cached tokens that differ from the text; return how many tokens of the text are missing, at least
        one."""
        held = self._texts[slot]
        # Only the last draft can differ. The last token is run again if its logits are needed.
        num_same = min(len(held), len(text) - 1)
        while num_same and held[num_same - 1] != text[num_same - 1]:
            num_same -= 1
        del held[num_same:]
        self._slots.past_len[slot] = num_same
        return len(text) - num_same

    def _catch_up(self, slot: int, text: list[int]) -> None:
        """Run one chunk of a text."""
        start = len(self._texts[slot])
        self._run({slot: text[start : min(start + self._prefill_chunk, len(text) - 1)]}, first=slot)

    def _run(self, feeds: dict[int, list[int]], *, first: int = 0) -> dict[int, int]:
        """Append tokens to their slots; return the most likely next token of each."""
        num_rows, width = max(feeds) + 1 - first, max(map(len, feeds.values()))
        token_ids, query_len = np.zeros((num_rows, width), np.int64), np.zeros(num_rows, np.int32)
        for slot, ids in feeds.items():
            token_ids[slot - first, : len(ids)] = ids
            query_len[slot - first] = len(ids)
        if num_rows > 1 and int(self._slots.past_len[first : first + num_rows].max()) + width > self._slots.capacity:
            # Padded to its neighbours' width, a row would exceed its slot.
            return {slot: self._run({slot: ids}, first=slot)[slot] for slot, ids in feeds.items()}
        past_len = self._slots.past_len[first : first + num_rows]
        wanted = [(slot - first) * width + len(ids) - 1 for slot, ids in feeds.items()]
        logits = self._session.run(Batch(first, token_ids, past_len, query_len, np.array(wanted, np.int64)))
        self._slots.note_run(first, past_len + query_len)
        past_len += query_len
        for slot, ids in feeds.items():
            self._texts[slot] += ids
        return dict(zip(feeds, logits.argmax(-1).tolist(), strict=True))


def _text(sequence: LiveSequence) -> list[int]:
    return state_of(sequence).lookup.text_ids
