# mypy: ignore-errors
"""Cohere's SDK: rerank by its first and its second API."""

import os
from importlib.metadata import version

import cohere

ROOT = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
DOCUMENTS = ["a dog", "the cat sat", "one two"]
print("cohere", version("cohere"))

second = cohere.ClientV2("none", base_url=ROOT)
answer = second.rerank(model=os.environ["RERANKER"], query="the cat", documents=DOCUMENTS, top_n=2)
assert [0 <= each.relevance_score <= 1 for each in answer.results] == [True, True]
cut = second.rerank(model=os.environ["RERANKER"], query="the cat", documents=DOCUMENTS, max_tokens_per_doc=1)
assert len(cut.results) == 3
print("v2")

first = cohere.Client("none", base_url=ROOT)
objects = [{"text": each} for each in DOCUMENTS]
answer = first.rerank(model=os.environ["RERANKER"], query="the cat", documents=objects, return_documents=True)
assert sorted(each.document.text for each in answer.results) == sorted(DOCUMENTS)
print("v1")
