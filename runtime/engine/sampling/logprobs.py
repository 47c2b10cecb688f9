"""Log-probabilities under the model itself: before penalties, bias, temperature and filters."""

import numpy as np

from runtime.core import Logprobs, TokenLogprob
from runtime.engine.sampling.filters import top_k
from runtime.engine.sampling.logits import Row, most_likely
from runtime.session.session import TopRow


def logprobs_of(row: Row, token_id: int, num_top: int) -> Logprobs:
    """The log-softmax of a row float32 [vocab_size] at a token and at the `num_top` most likely ones."""
    peak = row[most_likely(row)]
    with np.errstate(over="ignore", under="ignore"):
        shifted = row - peak
        log_sum = float(peak) + float(np.log(np.exp(shifted, out=shifted).sum()))  # pairwise: 1e-6 of the sum
    top: tuple[TokenLogprob, ...] = ()
    if num_top:
        ids = top_k(row, min(num_top, len(row)))
        ids = ids[np.argsort(-row[ids], kind="stable")]
        top = tuple(TokenLogprob(int(i), float(row[i]) - log_sum) for i in ids)
    return Logprobs(float(row[token_id]) - log_sum, top)


def logprobs_of_top(top: TopRow, position: int, num_top: int) -> Logprobs:
    """The same, of the token at a position of a `TopRow`."""
    best = zip(top.ids[:num_top].tolist(), top.logits[:num_top].tolist(), strict=True)
    return Logprobs(
        float(top.logits[position]) - top.log_sum,
        tuple(TokenLogprob(token_id, logit - top.log_sum) for token_id, logit in best),
    )
