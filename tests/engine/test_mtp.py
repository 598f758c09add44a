"""Multi-token prediction: a checkpoint's own head drafts, and nothing about what is generated changes."""

import functools
import itertools
import logging
from dataclasses import replace

from mlxserver.engine.mlx import mx

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.loading import loader, mtp
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.identity import model_identity
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import CPU, CUDA
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.scheduler.drafting_rows import DraftingRow, EitherRow
from mlxserver.engine.scheduler.execution import make_prefill_strategy
from mlxserver.engine.scheduler.mtp_drafter import SIZES, MtpDrafter
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.scheduler.speculation_controller import SpeculationController
from mlxserver.engine.scheduler.step_costs import Plan
from tests.support.batch_driver import GREEDY, Driver, prompt, sequence
from tests.support.grammars import Even
from tests.support.mtp_models import CONFIGS, write_model
from tests.support.prefixes import new_prefixes

PADDED = replace(CPU, pad_slots=True)
BUCKETED = replace(PADDED, bucket_prefill=True)
COMPILED = replace(BUCKETED, compile_steps=True)
VOCAB = 376  # of the tokenizer
BEHIND = "model.layers.3."  # the names of a head's weights in the checkpoint


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """On a CPU, each shape of a compiled function takes seconds of the compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def follows(token):
    """The token that always follows in a model of make_right()."""
    return (7 * token + 3) % VOCAB


def make_right(weights, is_hidden_first=False):
    """Layers that add nothing: the next token depends on the last one alone, and the head finds the one behind it."""
    for name in weights:
        if ".o_proj." in name or ".down_proj." in name:
            weights[name] = mx.zeros_like(weights[name])
    embeddings = weights["model.embed_tokens.weight"]
    vocab, dim = embeddings.shape
    assert vocab == VOCAB
    heads = np.zeros((vocab, dim), np.float32)
    heads[[follows(token) for token in range(vocab)]] = np.array(embeddings)
    weights["lm_head.weight"] = mx.array(heads)
    halves = [mx.eye(dim), mx.zeros((dim, dim))]
    weights["mtp.projection.weight"] = mx.concatenate(halves[::-1] if is_hidden_first else halves, axis=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directories of models, each written once: of a kind, right or not."""
    written = {}

    def write(kind, is_right=False):
        if (kind, is_right) not in written:
            path = tmp_path_factory.mktemp(kind)
            edit = functools.partial(make_right, is_hidden_first=kind == "mimo") if is_right else lambda weights: None
            written[kind, is_right] = write_model(path, CONFIGS[kind], edit)
        return written[kind, is_right]

    return write


@pytest.fixture(scope="module")
def load(checkpoint):
    """Loaded models, each once."""
    loaded = {}

    def load_once(kind="glm", is_right=False, **settings):
        name = kind, is_right, *settings.items()
        if name not in loaded:
            spec = ModelSpec("model", str(checkpoint(kind, is_right)), **settings)
            loaded[name] = loader.load(spec, policy=CPU)
        return loaded[name]

    return load_once


def scheduler(own, speculation="always", **options):
    return Scheduler(own.model, speculation=speculation, **{"policy": CPU, **options})


def run(own, *sequences, **options):
    return Driver(scheduler(own, **options), *sequences).finish()


def sampled(seed, **settings):
    return SamplingParams(temperature=1.0, seed=seed, **settings)


def asked():
    return [
        sequence(1, prompt(40, 1), GREEDY, 24),
        sequence(2, prompt(7, 2) * 4, sampled(2), 24),
        sequence(3, prompt(245, 3), sampled(3, frequency_penalty=0.5, repetition_penalty=1.1), 24),
        sequence(4, prompt(1, 4), sampled(4, top_p=0.9, top_k=2), 17),
        sequence(5, prompt(30, 5), GREEDY, 12, constraint=Even()),
        sequence(6, prompt(3, 6), sampled(6), 1),
        sequence(7, prompt(3, 7), sampled(7, min_p=0.1), 2),
        sequence(8, prompt(100, 8), GREEDY, 20),
    ]


@pytest.fixture(scope="module")
def answered(load):
    """Tokens of asked() without any speculation, by kind of model."""
    return functools.cache(
        lambda kind="glm", is_right=False: run(load(kind, is_right, mtp=False), *asked(), speculation="off")
    )


# Loading


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_head_of_a_checkpoint_is_a_part_of_its_model(load, kind):
    own, plain = load(kind), load(kind, mtp=False)
    assert mtp.has_head(own.model)
    assert not mtp.has_head(plain.model)
    assert len(caches.new_cache(own.model)) == 5
    assert len(caches.new_cache(plain.model)) == 3
    assert own.weight_bytes - plain.weight_bytes == sum(
        array.nbytes for _, array in tree_flatten(own.model["mtp"].parameters())
    )
    tokens = mx.array([prompt(20)])
    cache = caches.new_cache(own.model)
    assert mx.array_equal(own.model(tokens), plain.model(tokens))
    assert mx.allclose(own.model(tokens, cache=cache), plain.model(tokens), atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"mtp": False}, {"speculation": "off"}, {"draft": "other"}, {"kv_bits": 8, "kv_group_size": 32}]
)
def test_a_head_that_would_draft_nothing_is_not_loaded(load, settings):
    assert not mtp.has_head(load(**settings).model)


def test_where_steps_are_compiled_and_none_is_warmed_up_only_always_drafts():
    assert mtp.is_wanted(ModelSpec("model", "source"), CUDA)
    for speculation, is_wanted in (("auto", False), ("always", True)):
        spec = ModelSpec("model", "source", speculation=speculation)
        assert mtp.is_wanted(spec, replace(CUDA, warm_up_all_batch_sizes=False)) == is_wanted


def without(names, weights, directory):
    """The checkpoint with these of its files' weights dropped or changed."""
    for file in directory.glob("model-*.safetensors"):
        own = {name: weights(name, array) for name, array in mx.load(str(file)).items() if not names(name)}
        mx.eval(own)
        file.unlink()
        mx.save_safetensors(str(file), own)


def kept(name, array):
    return array


BROKEN = {
    "dropped": (lambda name: name.startswith(BEHIND), kept, "it is not in the checkpoint"),
    "one missing": (lambda name: name.endswith("hnorm.weight"), kept, "mtp.hidden_norm.weight is missing"),
    "an expert missing": (
        lambda name: name == f"{BEHIND}mlp.experts.2.up_proj.weight",
        kept,
        "'model.layers.0.mlp.experts.2.up_proj.weight'",
    ),
    "another shape": (
        lambda name: False,
        lambda name, array: array[:, :10] if "eh_proj" in name else array,
        "mtp.projection.weight has the shape [128, 10]; expected [128, 256]",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_model_whose_head_is_not_whole_is_loaded_without_it(tmp_path, caplog, fault):
    names, change, reason = BROKEN[fault]
    write_model(tmp_path, CONFIGS["glm"])
    without(names, change, tmp_path)
    with caplog.at_level(logging.DEBUG, "engine"):
        own = loader.load(ModelSpec("model", str(tmp_path)), policy=CPU)
    assert not mtp.has_head(own.model)
    assert [(record.levelname, record.message) for record in caplog.records if "head" in record.message] == [
        ("DEBUG", f"no multi-token prediction head: {reason}")
    ]
    assert scheduler(own).execution.draft is None
    assert run(own, sequence(1, prompt(5), GREEDY, 2))


@pytest.mark.parametrize("has_quantized_head", [True, False])
def test_a_quantized_checkpoint_may_have_its_head_in_16_bits(tmp_path, has_quantized_head):
    config = CONFIGS["glm"] | {"quantization": {"group_size": 64, "bits": 8}}
    write_model(tmp_path, config)
    quantize(tmp_path, lambda name: has_quantized_head or not name.startswith(BEHIND))
    stored = loader.load(ModelSpec("model", str(tmp_path), weights="stored"), policy=CPU)
    assert ("scales" in stored.model["mtp"].projection) == has_quantized_head
    assert ("scales" in stored.model["mtp"].layer.mlp.switch_mlp.up_proj) == has_quantized_head
    assert "scales" in stored.model.lm_head
    # A CPU has no products of experts in 16 bits.
    assert scheduler(stored).execution.draft == ("mtp" if has_quantized_head else None)
    own = loader.load(ModelSpec("model", str(tmp_path)), policy=CPU)
    one = sequence(1, prompt(20), GREEDY, 10)
    assert run(own, one) == run(own, one, speculation="off")


def quantize(directory, is_chosen):
    """Quantize the weights of linear layers and embeddings in a checkpoint, 8 bits in groups of 64."""
    for file in directory.glob("model-*.safetensors"):
        own = {}
        for name, array in mx.load(str(file)).items():
            if not is_chosen(name) or array.ndim != 2 or ".gate." in name:
                own[name] = array.astype(mx.bfloat16)
                continue
            base = name.removesuffix("weight")
            parts = mx.quantize(array.astype(mx.bfloat16), 64, 8)
            own |= {base + part: value for part, value in zip(("weight", "scales", "biases"), parts, strict=True)}
        mx.eval(own)
        file.unlink()
        mx.save_safetensors(str(file), own)


def test_the_estimate_has_the_head_and_its_kv_cache(checkpoint, load):
    for kind in CONFIGS:
        for settings in ({}, {"mtp": False}):
            spec = ModelSpec("model", str(checkpoint(kind)), min_context=100, **settings)
            own = load(kind, **settings)
            expected = estimate(spec, CPU)
            assert expected.weights == own.weight_bytes
            assert expected.cache == caches.cache_sizes(own.model).per_token * 100


def test_prefixes_with_and_without_the_head_are_not_of_one_model(load):
    identities = {model_identity(ModelSpec("model", "source"), load(**own)) for own in ({}, {"mtp": False})}
    assert len(identities) == 2


def test_the_builder_leaves_out_a_head_that_its_policy_has_no_use_for(checkpoint):
    spec = ModelSpec("model", str(checkpoint("glm")))
    for policy, draft in ((CPU, "mtp"), (replace(CPU, batch_cache="merged"), None)):
        runner = Builder(0.25, policy=policy).build(spec)
        assert runner.facts.execution.draft == draft
        assert mtp.has_head(runner.batch._model) == bool(draft)


# What it predicts


def published(directory):
    """The head's weights as the makers have published them, and the shared ones."""
    weights = {}
    for file in directory.glob("model-*.safetensors"):
        weights |= mx.load(str(file))
    return {name: np.array(array.astype(mx.float32)) for name, array in weights.items()}


def norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def rotated(x, partly=16):
    """x, [tokens, heads, dim], with the first dimensions rotated by the positions."""
    half = partly // 2
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    one, other = x[..., :half], x[..., half:partly]
    return np.concatenate([one * cos - other * sin, other * cos + one * sin, x[..., partly:]], axis=-1)


def glm_head(directory, hidden, tokens):
    """Hidden states behind tokens by the published formula, without any cache. hidden: before them, [tokens, dim]."""
    weights = published(directory)

    def own(name):
        return weights[f"{BEHIND}{name}.weight"]

    def swiglu(x, layer):
        gate, up = x @ own(f"{layer}.gate_proj").T, x @ own(f"{layer}.up_proj").T
        return (gate / (1 + np.exp(-gate)) * up) @ own(f"{layer}.down_proj").T

    embeddings = weights["model.embed_tokens.weight"][tokens]
    x = np.concatenate([norm(embeddings, own("enorm")), norm(hidden, own("hnorm"))], -1) @ own("eh_proj").T
    given = norm(x, own("input_layernorm"))
    q, k, v = (
        (given @ own(f"self_attn.{part}_proj").T).reshape(len(tokens), -1, 32) for part in ("q", "k", "v")
    )  # [tokens, heads, 32]
    q, k = rotated(norm(q, own("self_attn.q_norm"))), rotated(norm(k, own("self_attn.k_norm")))
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(32) + np.triu(np.full((len(tokens),) * 2, -np.inf), 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    attended = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v).reshape(len(tokens), -1)
    x = x + attended @ own("self_attn.o_proj").T
    given = norm(x, own("post_attention_layernorm"))
    chances = 1 / (1 + np.exp(-given @ own("mlp.gate").T))
    chosen = np.argsort(-(chances + weights[f"{BEHIND}mlp.gate.e_score_correction_bias"]))[:, :2]
    routed = np.stack([
        sum(chances[n, expert] * swiglu(given[n], f"mlp.experts.{expert}") for expert in experts)
        / chances[n, experts].sum()
        for n, experts in enumerate(chosen)
    ])  # fmt: skip
    return norm(x + routed + swiglu(given, "mlp.shared_experts"), own("shared_head.norm"))


def layered_head(own, hidden, tokens):
    """Hidden states behind tokens by mlx-lm's layer, without any cache. hidden: before them, [tokens, dim]."""
    head = own.model["mtp"]
    mask = mx.tril(mx.ones((len(tokens), len(tokens)), mx.bool_))
    embeddings = own.model.model.embed_tokens(mx.array([tokens]))
    return np.array(head(embeddings, mx.array(hidden)[None], mask, None)[0])


def expected_drafts(own, head, tokens, count):
    """Logits of the drafts behind a prompt, each drafted token the likeliest, [count, vocab]."""
    tokens = list(tokens)
    hidden = [*np.array(own.model.model(mx.array([tokens]))[0][:-1])]
    logits = []
    for _ in range(count):
        hidden.append(head(np.stack(hidden), tokens[1:])[-1])
        logits.append(np.array(own.model.lm_head(mx.array(hidden[-1]))))
        tokens.append(int(logits[-1].argmax()))
    return np.stack(logits)


@pytest.mark.parametrize("policy", [CPU, PADDED], ids=["slots", "padded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_drafts_are_those_of_the_published_formula(checkpoint, load, kind, policy):
    own = load(kind)
    prompts = [prompt(9, 1), prompt(260, 2), prompt(2, 3), prompt(23, 4)]
    prefilled = [caches.new_cache(own.model) for _ in prompts]
    for cache, tokens in zip(prefilled, prompts, strict=True):
        for start in range(0, len(tokens) - 1, 100):  # in chunks
            own.model(mx.array([tokens[start : min(start + 100, len(tokens) - 1)]]), cache=cache)
    batch = SlotCache(own.model, policy)
    batch.join(prefilled)
    logits = []

    def predict(tokens, hidden, cache):
        tokens, hidden = mtp.predict(own.model, tokens, hidden, cache)
        logits.append(own.model.lm_head(hidden)[:, 0])
        return tokens, hidden

    inputs = mx.array([tokens[-1] for tokens in prompts], dtype=mx.uint32)
    batch.make_room(4)
    drafted = batch.draft(inputs, 3, predict).tolist()
    for n, tokens in enumerate(prompts):
        expected = expected_drafts(own, functools.partial(layered_head, own), tokens, 3)
        assert drafted[n] == expected.argmax(-1).tolist()
        if kind == "glm":
            by_formula = expected_drafts(own, functools.partial(glm_head, checkpoint(kind)), tokens, 3)
            assert np.abs(by_formula - expected).max() < 1e-3
    assert batch.lengths == [len(tokens) - 1 for tokens in prompts]


class Recorder:
    """Records what a scheduler's head drafts: the number of known tokens and the drafts, by sequence id."""

    def __init__(self, own):
        drafter = own._running._speculation.drafts._drafter
        assert isinstance(drafter, MtpDrafter)
        self.drafts = {}
        draft = drafter.draft

        def recording(sequences, drafting, count):
            drafted = draft(sequences, drafting, count)
            for running in drafting:
                known = (*running.sequence.tokens, *running.fed[1:])
                self.drafts.setdefault(known, drafted[running.sequence.id])
            return drafted

        drafter.draft = recording


@pytest.mark.parametrize("kind", ["glm", "deepseek"])
def test_drafts_do_not_depend_on_chunks_prefixes_and_neighbours(load, kind):
    own = load(kind)
    prompts = [prompt(200, 1), (*prompt(200, 1)[:157], *prompt(30, 2)), prompt(60, 3)]
    alone = {}
    for tokens in prompts:
        first = scheduler(own)
        recorder = Recorder(first)
        Driver(first, sequence(1, tokens, GREEDY, 24)).finish()
        alone |= recorder.drafts
    second = scheduler(own, prefixes=new_prefixes(), stall_target=0.001, max_running=2)
    recorder = Recorder(second)
    driver = Driver(second, sequence(0, prompts[0], GREEDY, 24))
    driver.until_generated(0, 24)
    driver.add(*[sequence(n, tokens, GREEDY, 24) for n, tokens in enumerate(prompts[1:], 1)])
    driver.finish()
    assert driver.cached[1] == 157
    shared = recorder.drafts.keys() & alone.keys()
    assert len(shared) > 20
    assert {known: recorder.drafts[known] for known in shared} == {known: alone[known] for known in shared}


@pytest.mark.parametrize("policy", [CPU, BUCKETED], ids=["padded", "bucketed"])
def test_prompts_that_share_chunks_have_the_kv_cache_that_they_have_alone(load, policy):
    own = load()
    strategy = make_prefill_strategy(own.model, policy)
    prompts = [PendingPrompt([sequence(n, prompt(length, n))], 0.0) for n, length in enumerate((40, 3, 90))]
    for pending in prompts:
        pending.cache = caches.new_cache(own.model)
    while waiting := [pending for pending in prompts if pending.remaining]:
        strategy.run(strategy.choose(waiting, 60))
    for pending in prompts:
        alone = caches.new_cache(own.model)
        own.model(mx.array([pending.tokens[:-1]]), cache=alone)
        count = len(pending.tokens) - 1
        for layer, expected in zip(pending.cache[3:], alone[3:], strict=True):
            assert layer.offset == expected.offset == count
            for got, wanted in ((layer.keys, expected.keys), (layer.values, expected.values)):
                assert mx.allclose(got[:, :, 1:count], wanted[:, :, 1:count], atol=1e-4)


def test_a_prefix_from_disk_has_what_the_head_needs(load, tmp_path):
    own, drafts, cached = load(), [], []
    for _ in range(2):
        disk = DiskTier(tmp_path, 1 << 30)
        prefixes = PrefixCache(RamTier(), disk).open(ModelIdentity("files"), 1 << 30, "model")
        prefixes.is_warm = True
        process = scheduler(own, prefixes=prefixes)
        recorder = Recorder(process)
        driver = Driver(process, sequence(1, prompt(200), GREEDY, 12))
        driver.finish()
        drafts.append(recorder.drafts)
        cached.append(driver.cached[1])
        disk.flush()
        disk.close()
    assert cached == [0, 128]  # in whole blocks
    assert drafts[0] == drafts[1]


# What is generated


SLOTS = [(kind, False, CPU) for kind in CONFIGS] + [("glm", True, CPU)]
OTHERS = [("glm", False, BUCKETED), ("deepseek", True, BUCKETED)]


@pytest.mark.parametrize(("kind", "is_right", "policy"), SLOTS + OTHERS)
def test_tokens_are_the_same_with_the_head_and_without(load, answered, kind, is_right, policy):
    own, metrics = load(kind, is_right), ModelMetrics("")
    tokens = run(own, *asked(), policy=policy, metrics=metrics)
    assert tokens == answered(kind, is_right)
    assert [len(tokens[one.id]) for one in asked()] == [one.max_tokens for one in asked()]
    assert metrics.drafted_tokens > 60
    assert metrics.accepted_tokens > 60 or not is_right


@pytest.mark.parametrize("kind", ["glm", "mimo"])
def test_a_head_that_is_always_right_saves_three_steps_of_four(load, kind):
    metrics, without = ModelMetrics(""), ModelMetrics("")
    own = load(kind, is_right=True)
    one = sequence(1, (5, 9), GREEDY, 101)
    tokens = run(own, one, metrics=metrics)
    assert tokens == run(own, one, speculation="off", metrics=without)
    assert tokens[1][:3] == [follows(9), follows(follows(9)), follows(follows(follows(9)))]
    assert metrics.accepted_tokens == metrics.drafted_tokens
    assert metrics.batch_size.count < without.batch_size.count / 3.5


def test_sequences_join_leave_and_are_cancelled_beside_drafts(load, answered):
    driver = Driver(scheduler(load(), max_running=3, prefixes=new_prefixes()), *asked()[:4])
    driver.until_generated(2, 12)
    driver.scheduler.remove([1])
    driver.add(*asked()[4:])
    tokens = driver.finish()
    expected = answered()
    assert {id: own for id, own in tokens.items() if id != 1} == {n: own for n, own in expected.items() if n != 1}
    assert tokens[1] == expected[1][: len(tokens[1])]


def test_sequences_that_are_preempted_resume_with_the_same_tokens(load):
    some = [sequence(n, prompt(240, n), sampled(n), 24) for n in (1, 2)]
    expected = run(load(), *some, speculation="off")
    for prefixes in (new_prefixes(), None):
        assert run(load(), *some, max_kv_tokens=600, prefixes=prefixes) == expected


def test_a_restart_goes_on_with_the_same_tokens(load, answered):
    driver = Driver(scheduler(load()), *asked()[:3])
    driver.until_generated(2, 10)
    for token in driver.scheduler.restart([1, 2, 3]):
        driver.tokens[token.sequence_id].append(token.token)
    assert driver.finish() == {id: answered()[id] for id in (1, 2, 3)}


def test_log_probabilities_are_those_of_each_token(load):
    def recorded(**options):
        own, tokens = scheduler(load(is_right=True), **options), []
        own.insert([sequence(1, prompt(20), sampled(3), 40, top_logprobs=2)])
        while len(tokens) < 40:
            tokens += own.decode()
            own.prefill()
        return tokens

    for own, other in zip(recorded(), recorded(speculation="off"), strict=False):
        assert own.token == other.token
        assert own.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=1e-3)
        assert [token for token, _ in own.logprobs.top] == [token for token, _ in other.logprobs.top]


def test_a_head_that_overflows_changes_no_text(answered, checkpoint):
    own = loader.load(ModelSpec("model", str(checkpoint("glm"))), policy=CPU)
    own.model["mtp"].norm.weight *= float("inf")
    own.model["mtp"].layer.self_attn.v_proj.weight *= float("inf")
    assert run(own, *asked()[:3], prefixes=new_prefixes()) == {id: answered()[id] for id in (1, 2, 3)}


def test_a_head_whose_passes_can_not_be_built_drafts_nothing(checkpoint, caplog):
    own = loader.load(ModelSpec("model", str(checkpoint("glm"))), policy=CPU)
    own.model["lm_head"] = lambda hidden: (
        hidden[:, :0] if hidden.shape[0] == 2 else own.model.model.embed_tokens.as_linear(hidden)
    )
    with caplog.at_level(logging.INFO, "engine"):
        assert scheduler(own).execution.draft is None
    assert "its multi-token prediction head drafts nothing" in caplog.text


# When it drafts


def test_auto_drafts_in_vain_only_for_a_short_time(load, monkeypatch):
    """By a clock of its own: a busy machine makes single steps long, by which no draft is worth less."""
    metrics, clock, own = ModelMetrics(""), [0.0], load()
    compute = type(own.model.model).__call__

    def timed(self, tokens, *rest, **options):
        clock[0] += 1.0 + 0.1 * (tokens.shape[1] - 1)
        return compute(self, tokens, *rest, **options)

    monkeypatch.setattr(type(own.model.model), "__call__", timed)
    monkeypatch.setattr("mlxserver.engine.scheduler.step_times.perf_counter", lambda: clock[0])
    one = sequence(1, prompt(20), sampled(1), 100)
    assert run(own, one, metrics=metrics, speculation="auto") == run(load(), one, speculation="off")
    assert 0 < metrics.drafted_tokens < 60
    assert clock[0] > 100


def test_it_drafts_as_many_tokens_as_pay_by_how_often_each_is_right():
    def fits(tokens):
        return True

    def controller(*costs):
        own = SpeculationController(
            ModelMetrics(""), draft_rates=MtpDrafter.rates(), draft_sizes=SIZES, draft_cost=0.02
        )
        for _ in range(3):
            own.costs(1).note_plain(1.0)
        for _ in range(3):
            for tokens, cost in costs:
                own.note_verified(1, Plan(tokens, is_modelled=True), cost)
        return own

    def row(own):
        return EitherRow(None, DraftingRow(0, 100, own.draft_rates))

    own = controller()
    assert own.choose(1, [], fits, [row(own)]) == Plan(2, is_modelled=True)
    own = controller((2, 1.1), (3, 1.15), (4, 1.2))
    assert own.choose(1, [], fits, [row(own)]) == Plan(4, is_modelled=True)
    for _ in range(100):
        own.draft_rates.note(0, True)
        own.draft_rates.note(1, False)
    assert own.choose(1, [], fits, [row(own)]) == Plan(2, is_modelled=True)
    for _ in range(2000):
        own.draft_rates.note(0, False)
    assert own.choose(1, [], fits, [row(own)]).tokens == 1


def test_where_steps_are_compiled_a_head_drafts_in_shapes_that_were_warmed_up(load, monkeypatch):
    ticks, metrics = itertools.count(), ModelMetrics("")
    monkeypatch.setattr("mlxserver.engine.scheduler.step_times.perf_counter", lambda: float(next(ticks)))
    policy = replace(COMPILED, warm_up_all_batch_sizes=True)
    own = scheduler(load(is_right=True), "auto", policy=policy, max_running=2, metrics=metrics)
    cache, made = own._running.cache, []
    draft, verify = cache.draft, cache.verify
    cache.draft = lambda inputs, count, predict: made.append((cache.shape, "draft")) or draft(inputs, count, predict)
    cache.verify = lambda tokens: made.append((cache.shape, tokens.shape[1])) or verify(tokens)
    some = [sequence(n, prompt(200, n), GREEDY if n == 1 else sampled(n), 100) for n in (1, 2)]
    expected = run(load(is_right=True, mtp=False), *some, speculation="off")
    assert Driver(own, *some).finish() == expected
    assert (made, metrics.drafted_tokens) == ([], 0)
    for _ in own.warm_up(512):
        pass
    rehearsed = {*made}
    assert {tokens for shape, tokens in rehearsed} == {"draft", 2, 3, 4, 16}
    made.clear()
    assert Driver(own, *some).finish() == expected
    assert {*made} <= rehearsed
    assert "draft" in {kind for _, kind in made}
    assert metrics.accepted_tokens > 20


def bytes_of_steps(own, policy):
    """Bytes that some steps of long slots take beside the slots, and then one draft if there is a head."""
    prefilled = [caches.new_cache(own.model) for _ in range(4)]
    for cache in prefilled:
        own.model(mx.array([prompt(20)]), cache=cache)
    batch = SlotCache(own.model, policy)
    batch.join(prefilled)
    batch.make_room(8000)
    inputs = mx.zeros((4,), dtype=mx.uint32)
    mx.eval(batch.advance(inputs))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(3):
        mx.eval(batch.advance(inputs))
    if mtp.has_head(own.model):
        mx.eval(batch.draft(inputs, 1, functools.partial(mtp.predict, own.model)))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("policy", [CPU, PADDED], ids=["slots", "padded"])
def test_a_step_computes_all_that_it_writes_in_place(load, policy):
    """What a step's logits do not need would pile up, and be computed with copies of whole slots later."""
    states = 4 * 8000 * 64 * 4  # bytes of one half of the hidden states
    assert bytes_of_steps(load(), policy) < bytes_of_steps(load(mtp=False), policy) + states / 4
