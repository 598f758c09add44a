"""From a conversation to the prompt that the model reads."""
