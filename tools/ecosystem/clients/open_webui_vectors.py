# mypy: ignore-errors
"""The calls that Open WebUI makes for its documents: OpenAI's and Ollama's embeddings, and an external reranker."""

import os

import httpx

VECTORS, RERANKER = os.environ["VECTORS"], os.environ["RERANKER"]
BASE = os.environ["OPENAI_BASE_URL"]
ROOT = BASE.removesuffix("/v1")
TEXTS = ["search_document: a cat", "the stock market"]

headers = {"Authorization": "Bearer none", "X-OpenWebUI-User-Name": "me", "X-OpenWebUI-User-Role": "user"}
with httpx.Client(headers=headers, timeout=120) as client:
    answer = client.post(f"{BASE}/embeddings", json={"input": TEXTS, "model": VECTORS}).raise_for_status().json()
    assert [len(each["embedding"]) for each in answer["data"]] == [384, 384]
    print("openai")

    answer = client.post(f"{ROOT}/api/embed", json={"input": TEXTS, "model": VECTORS}).raise_for_status().json()
    assert [len(each) for each in answer["embeddings"]] == [384, 384]
    print("ollama")

    query = {"model": RERANKER, "query": "the cat", "documents": ["a dog", "the cat sat"], "top_n": 2}
    for url in (f"{BASE}/rerank", f"{ROOT}/rerank"):
        results = client.post(url, json=query).raise_for_status().json()["results"]
        scores = [each["relevance_score"] for each in sorted(results, key=lambda each: each["index"])]
        assert len(scores) == 2
        assert all(0 <= score <= 1 for score in scores)
    print("rerank")
