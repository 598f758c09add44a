# mypy: ignore-errors
"""langchain-openai's embeddings of texts, and the form of its default: lists of token ids."""

import os
from importlib.metadata import version

import numpy as np
from langchain_openai import OpenAIEmbeddings
from openai import OpenAI

VECTORS = os.environ["VECTORS"]
TEXTS = ["a cat", "a kitten", "the stock market"]

print("langchain-openai", version("langchain-openai"))
texts = OpenAIEmbeddings(model=VECTORS, check_embedding_ctx_length=False)
cat, kitten, market = texts.embed_documents(TEXTS)
assert len(cat) == 384
assert np.dot(cat, kitten) > 0.7 > 0.3 > np.dot(cat, market)
assert np.dot(texts.embed_query("a cat"), cat) > 0.9999
print("texts")

# By default its ids are those of OpenAI's tokenizer, of no meaning to another model: here, the model's own.
ids = [[101, 1037, 4937, 102], [101, 1037, 18401, 102]]
found = OpenAI().embeddings.create(model=VECTORS, input=ids).data
assert np.dot(found[0].embedding, cat) > 0.9999
assert np.dot(found[1].embedding, kitten) > 0.9999
print("token ids")
