"""OpenAI's responses: the request, its dialect, and the store of past responses."""
