"""What context-parallel ranks hand each other in a layer, and by which method. Arithmetic only, no torch."""

from dataclasses import dataclass

from megatron_m1.config.layout import context_method
from megatron_m1.config.schema import Config

__all__ = ["Exchange", "keeps_attention", "key_value_exchange", "rank_tokens", "state_exchange"]

_STATE_ITEM = 4
_BF16 = 2


@dataclass(frozen=True)
class Exchange:
    """One layer, forward."""

    method: str
    """`ring`, `all_gather` or `transformer_engine`, with `auto` resolved."""
    gathered_bytes: float
    """What an all-gather brings a rank, by which `auto` chooses: of states from the others, of keys and values from all."""
    held_bytes: float
    """Of a rank itself."""
    in_turn_bytes: float
    """What must arrive before the last rank has all that it needs, in one collective or in messages that wait for each other."""


def rank_tokens(config: Config) -> float:
    """Tokens of one micro-batch that a context-parallel rank holds."""
    return config.training.seq_length * config.training.micro_batch / config.parallel.context


def key_value_exchange(config: Config) -> Exchange:
    """Keys and values of a softmax layer (model/softmax.py)."""
    model, parallel = config.model, config.parallel
    size = _BF16 if config.training.precision == "bf16" else 4
    held = 2 * rank_tokens(config) * model.num_key_value_heads * model.head_dim / parallel.tensor * size
    gathered = held * parallel.context
    return Exchange(context_method(parallel.context_softmax, gathered), gathered, held, held * (parallel.context - 1))


def keeps_attention(config: Config) -> bool:
    """Whether recomputation has the result of a softmax layer's attention, and does not repeat it (model/softmax.py)."""
    return config.parallel.context > 1 and config.parallel.context_softmax != "transformer_engine"


def state_exchange(config: Config, *, document_tokens: int | None = None) -> Exchange:
    """Lightning states, one per head and document that crosses a border of chunks (parallel/lightning_exchange.py).

    document_tokens: length of the documents that sequences are packed of; None: sequences are one document each.  Heads whose
    states fade within a chunk are counted as if they did not: on the tensor-parallel rank with the slowest decays few do.
    """
    model, parallel = config.model, config.parallel
    documents, chained = _crossing(config, document_tokens)
    state = documents * model.num_attention_heads / parallel.tensor * model.head_dim**2 * _STATE_ITEM
    held = 2 * state if parallel.context > 1 else 0.0
    gathered = held * (parallel.context - 1)
    method = context_method(parallel.context_lightning, gathered)
    # The chain of the ring has as many hops between ranks as the all-gather brings states.
    return Exchange(method, gathered, held, gathered if chained else held)


def _crossing(config: Config, document_tokens: int | None) -> tuple[float, bool]:
    """Documents of a micro-batch that cross one border, and whether any crosses two."""
    training, parallel = config.training, config.parallel
    length = min(document_tokens or training.seq_length, training.seq_length)
    if parallel.context_layout == "document":
        # Every document crosses all of them; planning/search.py counts half of a unit of padding to each in seq_length.
        padding = (2 * parallel.context - 1) / 2 if length < training.seq_length else 0.0
        return training.micro_batch * training.seq_length / (length + padding), True
    if config.data.document_boundaries == "ignore":
        return training.micro_batch, True
    # A pack is cut as a whole: one document at most lies across a border.
    return 1, document_tokens is None or length > rank_tokens(config) / 2
