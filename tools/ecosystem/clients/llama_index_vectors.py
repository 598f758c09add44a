# mypy: ignore-errors
"""llama-index's embeddings over an OpenAI-like server, and an index that is searched with them."""

import os
from importlib.metadata import version

from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

print("llama-index-core", version("llama-index-core"))
model = OpenAILikeEmbedding(
    model_name=os.environ["VECTORS"], api_base=os.environ["OPENAI_BASE_URL"], api_key="none", embed_batch_size=10
)
assert len(model.get_text_embedding("a cat")) == 384
assert len(model.get_text_embedding_batch(["a cat", "a dog"] * 20)) == 40
print("batches")

texts = ["Kittens are young cats.", "The stock market fell on Monday.", "Bread is baked in an oven."]
index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=model)
(best,) = index.as_retriever(similarity_top_k=1).retrieve("What is a kitten?")
assert best.text == texts[0]
print("index")
