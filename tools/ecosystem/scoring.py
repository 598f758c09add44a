"""lm-eval (lm-evaluation-harness) with local-completions: its log-likelihoods are those that mlx-lm computes here.

Two tasks of generated data: choices behind a question, and whole texts (rolling).
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlx_lm.utils import load

from tools.ecosystem.environments import programs_of, run
from tools.harness.models import SENTENCES, tiny_llama

CONTEXT = 2048
LARGEST_DIFFERENCE = 1e-3
PACKAGES = ("lm-eval[api]", "transformers")
CHOICES = """\
task: generated_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
TEXTS = """\
task: generated_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@dataclass(frozen=True, slots=True)
class Scoring:
    """The evaluation. key: of its model."""

    name: str = "lm-eval"
    directory: str = "lm-eval"
    key: str = "for-lm-eval"

    def write_model(self, directory: Path) -> str:
        """Write its model; returns its section of the configuration."""
        path = tiny_llama(directory / self.key, context=CONTEXT)
        return f'[models.{self.key}]\nsource = "{path}"\n'

    def try_out(self, directory: Path, url: str) -> str:
        """Install lm-eval into a directory, run both tasks and compare; one line on the outcome.

        Raises:
            CalledProcessError, TimeoutExpired: it failed.
            ValueError: a log-likelihood differs.
        """
        program = programs_of(directory, PACKAGES) / "lm_eval"
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            model = tiny_llama(work / self.key, context=CONTEXT)  # the same weights
            _write_tasks(work)
            run(_command(program, work, self.key, model, url), cwd=work)
            scored = [*_samples(work)]
            expected = _Reference(model)
            differences = [abs(value - expected.log_likelihood(*text)) for text, value in scored]
        if not differences or max(differences) > LARGEST_DIFFERENCE:
            raise ValueError(f"{len(scored)} log-likelihoods differ by up to {max(differences, default=0):g}")
        return f"{len(scored)} log-likelihoods, which differ from mlx-lm's by {max(differences):.1e} at the most"


class _Reference:
    """Log-likelihoods of one forward pass by mlx-lm."""

    def __init__(self, path: Path) -> None:
        loaded: Any = load(str(path))
        self._model, self._tokenizer = loaded[:2]

    def log_likelihood(self, context: str | None, text: str) -> float:
        """That of a text behind a context; None: behind the prefix token alone."""
        if context is None:
            first = self._tokenizer.bos_token_id
            tokens = [self._tokenizer.eos_token_id if first is None else first, *self._tokenizer.encode(text)]
            start = 1
        else:
            tokens, start = self._tokenizer.encode(context + text), len(self._tokenizer.encode(context))
        logits = self._model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
        own = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(own, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
        return sum(cast(list[float], chosen[start - 1 :].tolist()))


def _write_tasks(work: Path) -> None:
    """Write both tasks and their data."""
    draw = random.Random(0)
    words = " ".join(SENTENCES).replace(".", "").replace(",", "").split()
    choices = [
        {
            "text": " ".join(draw.choices(words, k=draw.randint(2, 200))),
            "choices": [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for _ in range(20)
    ]
    texts = [{"text": " ".join(draw.choices(words, k=draw.randint(5, 300)))} for _ in range(10)]
    for name, task, rows in (("choices", CHOICES, choices), ("texts", TEXTS, texts)):
        data = work / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (work / f"{name}.yaml").write_text(task.format(data=data))


def _command(program: Path, work: Path, key: str, model: Path, url: str) -> list[str]:
    arguments = {
        "model": key,
        "base_url": f"{url}/v1/completions",
        "tokenizer": model,
        "tokenizer_backend": "huggingface",
        "max_length": CONTEXT,
        "num_concurrent": 4,
    }
    return [
        *(str(program), "--model", "local-completions", "--batch_size", "3"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", "generated_choices,generated_texts", "--include_path", str(work)),
        *("--output_path", str(work / "out"), "--log_samples"),
    ]


def _samples(work: Path) -> Iterator[tuple[tuple[str | None, str], float]]:
    """Context, text and log-likelihood of each request."""
    for path in work.glob("out/**/samples_*.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            for arguments, answers in zip(sample["arguments"].values(), sample["resps"], strict=True):
                parts = [*arguments.values()]
                context, text = parts if len(parts) == 2 else (None, parts[0])
                value = answers[0][0] if isinstance(answers[0], list) else answers[0]
                yield (context, text), float(value)
