"""A small model and sequences of every kind, for what is to be the same with speculation and without."""

from dataclasses import replace
from functools import cache

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.loading.kv_format import quantize_kv
from mlxserver.engine.platform.policy import CPU
from tests.support.architectures import random_model
from tests.support.batch_driver import GREEDY, prompt, sequence
from tests.support.grammars import Even

PADDED = replace(CPU, pad_slots=True)
COMPILED = replace(PADDED, bucket_prefill=True, compile_steps=True, warm_up_all_batch_sizes=True)  # as on a GPU
FEW = {5: 90.0, 6: 90.0, 7: 89.5}  # tokens that an answer may have: n-grams recur, and some predictions are right


@cache
def model(name="llama", kv=None, **fields):
    own = random_model(name, **{"head_dim": 64, "hidden_size": 128, "num_hidden_layers": 2, **fields})
    quantize_kv(own, kv)
    return own


def sampled(seed, **settings):
    return SamplingParams(**{"temperature": 1.0, "seed": seed, **settings})


def asked(logit_bias=None):
    """Sequences that differ in their prompts, settings and lengths. logit_bias: of all but the last one and the one
    with a constraint.
    """
    bias = {"logit_bias": logit_bias or {}}
    return [
        sequence(1, prompt(40, 1), SamplingParams(temperature=0.0, **bias), 40),
        sequence(2, prompt(7, 2) * 4, sampled(2, **bias), 40),
        sequence(3, prompt(245, 3), sampled(3, frequency_penalty=0.5, repetition_penalty=1.1, **bias), 40),
        sequence(4, prompt(1, 4), sampled(4, top_p=0.9, top_k=2, **bias), 33),
        sequence(5, prompt(30, 5), GREEDY, 20, constraint=Even()),
        sequence(6, prompt(3, 6), sampled(6, **bias), 1),
        sequence(7, prompt(3, 7), sampled(7, min_p=0.1, **bias), 2),
        sequence(8, prompt(100, 8), GREEDY, 30),
    ]


def fits(tokens):
    """Room in the batch for drafts of any length, as a controller asks for it."""
    return True
