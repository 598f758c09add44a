"""Grammars, and a constraint without one."""


def admits(grammars, tokenizer, grammar, text):
    """Whether a text, in the tokenizer's own tokens, is a whole answer of the grammar."""
    matcher = grammars.compile(grammar).deep_copy()
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


class Even:
    """A constraint that allows tokens with even ids, and records those it accepts."""

    def __init__(self):
        self.accepted = []

    def allowed(self):
        return b"\x55" * 50

    def accept(self, token):
        self.accepted.append(token)
