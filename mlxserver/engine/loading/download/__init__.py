"""Downloads of repositories into the Hugging Face cache, which go on where they were stopped."""
