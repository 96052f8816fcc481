"""An HTML page of one step's rollouts."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.rl.samples import Sample

__all__ = ["write_page"]

SHOWN_TOKENS = 2048
"""Of a response, from its start and from its end each; what lies between is counted."""
STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 75em } pre { white-space: pre-wrap; background: #f4f4f4; padding: .5em }
.sample { border-top: 1px solid #ccc; padding: .4em 0 } .facts { color: #555; font-size: 85% }
.token { font-family: monospace; white-space: pre-wrap } .capped { outline: 2px solid #c00 } .right { color: #070 }
"""


def write_page(
    path: Path,
    *,
    title: str,
    samples: Sequence[Sample],
    capped: Mapping[int, Tensor],
    tokenizer: Tokenizer,
    prompts: int,
) -> None:
    """Put a page at `path` (its folder is made): prompts, responses, rewards with their parts, and every token on a background that
    is the darker the less probable it was, outlined in red where its importance weight hit the cap in an update; of long responses
    both ends.

    samples: those to show.  prompts: how many were sampled in all; the journal has them.
    capped: number of the sample -> bool [response tokens]; samples that were not trained on are not in it.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    body = [
        f"<h1>{escape(title)}</h1><p>{len(groups)} of {prompts} prompts. Darker: less probable. Red: at the cap.</p>"
    ]
    for members in groups.values():
        body.append(f"<h2>Prompt {members[0].group}</h2><pre>{escape(members[0].task.prompt)}</pre>")
        body += [_sample(sample, capped.get(sample.number), tokenizer) for sample in members]
    page = f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>{"".join(body)}'
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which JSON can carry into a prompt, has no UTF-8.
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def _sample(sample: Sample, capped: Tensor | None, tokenizer: Tokenizer) -> str:
    verdict = sample.reward_error if sample.reward is None else f"reward {sample.reward:g}"
    facts = [str(verdict), *(f"{name} {value:g}" for name, value in sample.parts.items()), sample.finish_reason]
    facts += [f"log p {float(sample.logprobs.sum()):.3f}", f"weights {sample.weights}"]
    if capped is None:
        facts.append("not trained on")
    marks = [False] * len(sample.response) if capped is None else capped.tolist()
    probabilities = np.exp(sample.logprobs).tolist()
    tokens = [
        f'<span class="token{" capped" if mark else ""}" title="p {p:.4f}" style="background: rgba(240,150,0,{1 - min(p, 1):.2f})">'
        f"{escape(tokenizer.decode([token], skip_special=False))}</span>"
        for token, p, mark in _ends(list(zip(sample.response, probabilities, marks, strict=True)))
    ]
    if len(sample.response) > len(tokens):
        tokens.insert(SHOWN_TOKENS, f"<p>({len(sample.response) - len(tokens)} tokens are not shown)</p>")
    right = " right" if sample.reward is not None and sample.reward >= 1 else ""
    return f'<div class="sample"><div class="facts{right}">{escape("; ".join(facts))}</div>{"".join(tokens)}</div>'


def _ends(tokens: list[Any]) -> list[Any]:
    """The first and the last SHOWN_TOKENS."""
    return tokens if len(tokens) <= 2 * SHOWN_TOKENS else [*tokens[:SHOWN_TOKENS], *tokens[-SHOWN_TOKENS:]]
