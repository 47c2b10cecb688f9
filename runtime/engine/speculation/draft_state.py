"""Speculation's state of one sequence: its text for prompt lookup, and acceptance rates."""

from dataclasses import dataclass

from runtime.engine.sequence import LiveSequence
from runtime.engine.speculation.prompt_lookup import PromptLookup
from runtime.engine.speculation.running_mean import updated

MAX_DRAFT = 15
"""Most draft tokens of a row."""
UNMEASURED_MODEL = 0.7
"""Acceptance rate of a draft model before it was tried."""
RETRY = 0.01
"""Share by which the rate of a draft model goes back there in each step without a draft, so that a model that did not
pay is tried again now and then."""


@dataclass(slots=True)
class DraftState:
    """`is_modelled`: the draft of this step is the draft model's."""

    lookup: PromptLookup
    model_rate: float = UNMEASURED_MODEL
    is_modelled: bool = False

    def push(self, token_id: int) -> None:
        """The text goes on with this token."""
        self.lookup.push(token_id)

    def observe_model(self, num_drafted: int, num_accepted: int) -> None:
        """The draft model proposed so many tokens, and so many of them were right."""
        for is_right in [True] * num_accepted + [False] * (num_accepted < num_drafted):
            self.model_rate = updated(self.model_rate, is_right)

    def forget_model(self) -> None:
        """A step went by without a draft. Only a draft that is run shows whether the draft model is right."""
        self.model_rate += RETRY * (UNMEASURED_MODEL - self.model_rate)


def state_of(sequence: LiveSequence) -> DraftState:
    """The state that `Speculator.attach` gave the sequence."""
    assert isinstance(sequence.draft_state, DraftState)
    return sequence.draft_state
