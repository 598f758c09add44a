"""Sizes of a measurement: counts and lengths, by the kind of device.

Rule 1: all servers of a run are measured with the same Sizes; they are kept with the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["greedy", "sampled", "seeded"]

RAW, RAW_MLX_LM, BANDWIDTH = "raw", "raw mlx-lm", "bandwidth"  # parts of the results; a scenario of the first

GREEDY: Mapping[str, Any] = {"temperature": 0.0}
SAMPLED: Mapping[str, Any] = {"temperature": 0.7, "top_p": 0.9}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths in tokens, counts in requests.

    concurrency: clients of the closed loops; the last is the peak, which the seeded, raw and target measures use.
    seeded_requests_per_client: requests_per_client where each has a seed. pair_clients: of the two models used at once.
    conversations: number of two-turn conversations. stream_tokens: length of the stream beside the long prefill.
    long_tokens, long_answer: lengths of the conversation that short requests of `few` clients run beside.
    session_tokens, session_turns: last prompt and number of turns of the agent session.
    texts: number of texts to embed. warmup_tokens: length of the warm-up answers.
    raw_batch: sequences of the batch with distinct settings.
    """

    prompt_tokens: int
    max_tokens: int
    concurrency: tuple[int, ...]
    requests_per_client: int
    seeded_requests_per_client: int
    pair_clients: int
    conversation_tokens: int
    conversations: int
    prefill_tokens: int
    stream_tokens: int
    warmup_tokens: int
    raw_batch: int
    long_tokens: int
    long_answer: int
    session_tokens: int
    session_turns: int
    texts: int
    few: int = 8

    @property
    def peak(self) -> int:
        """The highest concurrency."""
        return self.concurrency[-1]


CPU = Sizes(
    prompt_tokens=64,
    max_tokens=32,
    concurrency=(1, 4, 16),
    requests_per_client=3,
    seeded_requests_per_client=1,
    pair_clients=4,
    conversation_tokens=2000,
    conversations=2,
    prefill_tokens=4000,
    stream_tokens=128,
    warmup_tokens=4,
    raw_batch=16,
    long_tokens=6000,
    long_answer=250,
    session_tokens=2000,
    session_turns=5,
    texts=48,
)
GPU = Sizes(
    prompt_tokens=250,
    max_tokens=128,
    concurrency=(1, 4, 16, 32),
    requests_per_client=4,
    seeded_requests_per_client=2,
    pair_clients=8,
    conversation_tokens=2000,
    conversations=5,
    prefill_tokens=4000,
    stream_tokens=512,
    warmup_tokens=128,
    raw_batch=32,
    long_tokens=60_000,
    long_answer=1024,
    session_tokens=32_000,
    session_turns=10,
    texts=1000,
)
QUICK = Sizes(
    prompt_tokens=16,
    max_tokens=8,
    concurrency=(1, 4),
    requests_per_client=2,
    seeded_requests_per_client=1,
    pair_clients=2,
    conversation_tokens=100,
    conversations=1,
    prefill_tokens=200,
    stream_tokens=32,
    warmup_tokens=2,
    raw_batch=4,
    long_tokens=300,
    long_answer=32,
    session_tokens=200,
    session_turns=2,
    texts=8,
)


def split_scenario(name: str) -> tuple[str, int]:
    """Kind and clients of the name of a load, as in "sampled c=4"."""
    kind, _, clients = name.rpartition(" c=")
    return kind, int(clients)


def raw_scenarios(sizes: Sizes, *, full: bool) -> dict[str, tuple[str, ...]]:
    """The scenarios of the raw engines by part; names of loads are those of a server's."""
    ours = (f"sampled c={sizes.peak}", *(f"{kind} batch c={sizes.raw_batch}" for kind in ("greedy", "distinct")))
    if not full:
        return {RAW: ours}
    theirs = tuple(f"{kind} c={sizes.peak}" for kind in ("greedy", "sampled", "sampler a row"))
    return {RAW: (*ours, BANDWIDTH), RAW_MLX_LM: theirs}
