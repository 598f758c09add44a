"""Rerank over real sockets: a cross-encoder and a judge beside a text model and an embedding model."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.support.published import check
from tests.support.servers import clean_server
from tools.harness.encoder_models import POSITIONS, tiny_cross_encoder, tiny_embedder, tiny_judge
from tools.harness.running_server import eventually

QUERY = "whether the cat sat"
DOCUMENTS = ["the cat sat on a mat", "dog", "a dog ran far away", "one two three " * 9, ""]
QUESTION = [{"role": "user", "content": "hello"}]
RERANKERS = ("cross", "judge")


@pytest.fixture(scope="module")
def server(tmp_path_factory, scripted_path):
    """Two rerankers, an embedding model and a text model."""
    folder = tmp_path_factory.mktemp("models")
    config = folder / "models.toml"
    config.write_text(
        f'[models.cross]\nsource = "{tiny_cross_encoder(folder / "cross", "bert")}"\nmax_waiting = 64\n'
        f'[models.judge]\nsource = "{tiny_judge(folder / "judge")}"\nkind = "rerank"\n'
        f'[models.vectors]\nsource = "{tiny_embedder(folder / "vectors", "modernbert")}"\n'
        f'[models.talker]\nsource = "{scripted_path}"\ntype = "instruction"\npreload = true\n'
    )
    with clean_server("--no-defaults", "--config", str(config)) as server:
        yield server


def rerank(server, model="cross", path="/v1/rerank", **parameters):
    return server.post(path, {"model": model, "query": QUERY, "documents": DOCUMENTS, **parameters})


def scores(answer):
    """Scores in the order of the documents."""
    check(answer.json, "Rerank")
    by_index = {each["index"]: each["relevance_score"] for each in answer.json["results"]}
    return [by_index[index] for index in sorted(by_index)]


def refusal(server, **parameters):
    answer = rerank(server, **parameters)
    assert answer.status == 400, answer.body
    return answer.error


@pytest.mark.parametrize("model", RERANKERS)
def test_documents_are_sorted_by_their_scores_and_each_is_as_if_it_were_alone(server, model):
    answer = check(rerank(server, model).json, "Rerank")
    found = [each["relevance_score"] for each in answer["results"]]
    assert found == sorted(found, reverse=True)
    assert all(0 <= score <= 1 for score in found)
    alone = [scores(rerank(server, model, documents=[document]))[0] for document in DOCUMENTS]
    np.testing.assert_allclose(scores(rerank(server, model)), alone, atol=2e-5)
    assert all("document" not in each for each in answer["results"])
    tokens = answer["usage"]["prompt_tokens"]
    assert (answer["usage"]["total_tokens"], answer["meta"]["tokens"]["input_tokens"]) == (tokens, tokens)


def test_a_score_is_that_of_its_own_pair(server):
    first, other = rerank(server), rerank(server, query="dog")
    assert np.abs(np.array(scores(first)) - scores(other)).max() > 1e-3


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_every_path_takes_texts_and_objects_and_repeats_them_where_asked(server, path):
    documents = [{"text": text} if n % 2 else text for n, text in enumerate(DOCUMENTS)]
    answer = rerank(server, path=path, documents=documents, query={"text": QUERY}, return_documents=True, top_n=2)
    results = check(answer.json, "Rerank")["results"]
    assert [each["document"]["text"] for each in results] == [DOCUMENTS[each["index"]] for each in results]
    assert len(results) == 2
    for own, other in zip(results, rerank(server, return_documents=True).json["results"], strict=False):
        assert own.pop("relevance_score") == pytest.approx(other.pop("relevance_score"), abs=2e-5)
        assert own == other


def test_more_results_than_documents_are_no_error(server):
    assert len(rerank(server, top_n=99).json["results"]) == len(DOCUMENTS)
    assert len(rerank(server, top_n=None).json["results"]) == len(DOCUMENTS)


@pytest.mark.parametrize("model", RERANKERS)
def test_requests_of_many_clients_are_answered_right(server, model):
    whole = scores(rerank(server, model))
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda n: rerank(server, model, documents=DOCUMENTS[n % 4 :]), range(24)))
    for n, answer in enumerate(answers):
        np.testing.assert_allclose(scores(answer), whole[n % 4 :], atol=2e-5)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": "dog"}, "documents"),
        ({"documents": ["dog", 1]}, "documents[1]"),
        ({"documents": [{"title": "dog"}]}, "documents[0]"),
        ({"documents": ["dog"] * 2049}, "documents"),
        ({"query": ""}, "query"),
        ({"query": ["dog"]}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ({"rank_fields": ["title"]}, "rank_fields"),
        ({"instruction": "judge"}, "instruction"),
    ],
)
def test_what_is_no_request_is_refused_by_its_field(server, wrong, param):
    assert refusal(server, **wrong)["param"] == param


def test_what_changes_nothing_is_accepted(server):
    assert rerank(server, max_chunks_per_doc=10, priority=1, user="me").status == 200


def test_an_instruction_changes_the_scores_of_a_judge(server):
    plain, instructed = rerank(server, "judge"), rerank(server, "judge", instruction="judge the dog")
    assert np.abs(np.array(scores(plain)) - scores(instructed)).max() > 1e-4


@pytest.mark.parametrize("model", RERANKERS)
def test_a_document_that_is_too_long_is_refused_by_its_place_or_cut(server, model):
    longest = {"cross": POSITIONS, "judge": 512}[model]
    documents = ["dog", "cat " * 600]
    error = refusal(server, model=model, documents=documents)
    assert (error["param"], error["code"]) == ("documents[1]", "context_length_exceeded")
    assert f"tokens > {longest} maximum" in error["message"]
    short = rerank(server, model, documents=["dog"]).json["usage"]["prompt_tokens"]
    cut = rerank(server, model, documents=documents, truncate=True).json
    assert cut["usage"]["prompt_tokens"] == short + longest
    capped = rerank(server, model, documents=documents, max_tokens_per_doc=4).json
    assert capped["usage"]["prompt_tokens"] == short + short + 3
    assert refusal(server, model=model, query="cat " * 600, truncate=True)["param"] == "query"


@pytest.mark.parametrize("model", RERANKERS)
def test_a_request_of_the_wrong_kind_says_what_the_model_is(server, model):
    others = {
        "/v1/chat/completions": {"messages": QUESTION},
        "/v1/completions": {"prompt": "hello"},
        "/v1/messages": {"messages": QUESTION, "max_tokens": 5},
        "/v1/embeddings": {"input": "hello"},
        "/api/embed": {"input": "hello"},
        "/apply-template": {"messages": QUESTION},
    }
    for path, body in others.items():
        answer = server.post(path, {"model": model, **body})
        assert (answer.status, "is a reranker" in answer.body.decode()) == (400, True), path
    for other, words in (("talker", "is a text model"), ("vectors", "is an embedding model")):
        answer = rerank(server, other)
        assert (answer.status, words in answer.body.decode()) == (400, True), other


def test_a_reranker_shows_its_kind_before_and_after_its_load(server):
    server.post("/v1/models/unload", {"key": "cross"})
    assert check(server.model("cross"), "Model")["kind"] == "rerank"
    assert rerank(server).status == 200
    model = check(server.model("cross"), "Model")
    assert (model["kind"], model["type"], model["context_length"]) == ("rerank", None, POSITIONS)
    assert [name for name, has in model["capabilities"].items() if has] == ["rerank"]
    assert model["reserved_bytes"] >= model["memory_bytes"] > 0


def test_a_reranker_leaves_when_it_is_told_to(server):
    assert rerank(server, keep_alive=0).status == 200
    eventually(lambda: server.model("cross")["status"]["value"] == "unloaded")


def test_metrics_have_a_dialect_of_its_own(server):
    rerank(server)
    counted = 'mlx_server_requests_total{dialect="rerank",model="cross",outcome="stop"}'
    eventually(lambda: counted in server.get("/metrics").body.decode())  # the answer may come before


def test_its_tokenizer_answers(server):
    tokens = server.post("/tokenize", {"model": "cross", "prompt": "the dog"}).json["tokens"]
    assert server.post("/detokenize", {"model": "cross", "tokens": tokens}).json["prompt"] == "[CLS] the dog [SEP]"


def test_a_kind_that_the_files_do_not_have_is_refused_at_the_load(server, scripted_path):
    answer = server.post("/v1/models/load", {"model": str(scripted_path), "key": "wrong", "kind": "rerank"})
    assert (answer.status, "is no reranker" in answer.body.decode()) == (503, True), answer.body
