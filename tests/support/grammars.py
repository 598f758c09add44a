"""What a grammar admits."""


def admits(grammars, tokenizer, grammar, text):
    """Whether a text, in the tokenizer's own tokens, is a whole answer of the grammar."""
    matcher = grammars.compile(grammar).deep_copy()
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
