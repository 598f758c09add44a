"""Token ids of prompts that are encoded in segments: exactly those of the whole, with every kind of tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.loading import sources
from mlxserver.engine.prompt.chat_template import ChatTemplate
from mlxserver.engine.prompt.segments import SegmentEncoder
from tests.support.conversations import chat_prompt
from tools.harness.models import CHATML, SENTENCES

START, END, OPEN, CLOSE = "<|im_start|>", "<|im_end|>", "<think>", "</think>"
LLAMA2 = (
    "{{ bos_token }}{%- for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
METASPACE = {"replacement": "\u2581", "split": False}
TRAINING = [*SENTENCES, "caf\u00e9 \u4e2d\u6587 <b>bold</b>  two  spaces\n\nlines\n", "word" * 5] * 3


def trained(model, trainer, *, normalizer=None, pre_tokenizer=None, **flags):
    """A tokenizer of a kind, with ChatML's tokens. flags: of those."""
    core = Tokenizer(model)
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    core.train_from_iterator(TRAINING, trainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"]))
    special = flags.pop("special", True)
    core.add_tokens([AddedToken(text, special=special, **{"normalized": False} | flags) for text in (START, END)])
    core.add_tokens([AddedToken(text, normalized=False) for text in (OPEN, CLOSE, "\n\n", "<b>")])
    return core


def wrapped(core, template=CHATML):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return TokenizerWrapper(fast)


def sentencepiece(**options):
    """BPE as SentencePiece's, its prefix space set by a normalizer."""
    prepend = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return trained(model, trainers.BpeTrainer, normalizer=prepend, **options)


def byte_level(add_prefix_space=False, **options):
    space = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core = trained(models.BPE(), trainers.BpeTrainer, pre_tokenizer=space, **options)
    core.decoder = decoders.ByteLevel()
    return core


def digits():
    split = [pre_tokenizers.Split(Regex(r"\d{1,3}|\s+|\w+|[^\w\s]+"), "isolated"), pre_tokenizers.ByteLevel(False)]
    return trained(models.BPE(), trainers.BpeTrainer, pre_tokenizer=pre_tokenizers.Sequence(split))


def unigram(scheme):
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme, **METASPACE)
    model = models.Unigram([("<unk>", 0.0)], unk_id=0)
    trainer = lambda **options: trainers.UnigramTrainer(unk_token="<unk>", **options)  # noqa: E731
    return trained(model, trainer, normalizer=normalizers.NFKC(), pre_tokenizer=space)


def wordpiece():
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )


def with_overlaps():
    """Tokens that hold or overlap others, so that what a text is cut at depends on what stands around it."""
    core = byte_level()
    core.add_tokens([AddedToken(text, normalized=False) for text in (f"{START}user", f"x{END[:5]}", f"{END}{END}")])
    return core


CUT = {
    "byte-level BPE": lambda: wrapped(byte_level()),
    "byte-level BPE with prefix space": lambda: wrapped(byte_level(add_prefix_space=True)),
    "split digits": lambda: wrapped(digits()),
    "SentencePiece BPE": lambda: wrapped(sentencepiece()),
    "Llama 2": lambda: wrapped(sentencepiece(), LLAMA2),
    "Unigram, first": lambda: wrapped(unigram("first")),
    "Unigram, always": lambda: wrapped(unigram("always")),
    "Unigram, never": lambda: wrapped(unigram("never")),
    "WordPiece": lambda: wrapped(wordpiece()),
    "tokens that take the white space behind them": lambda: wrapped(byte_level(rstrip=True)),
    "tokens that are not special": lambda: wrapped(byte_level(special=False)),
}
WHOLE = {
    "tokens that take the white space before them": lambda: wrapped(byte_level(lstrip=True)),
    "tokens of whole words": lambda: wrapped(byte_level(single_word=True)),
    "tokens of normalized text": lambda: wrapped(wordpiece_with_normalized_tokens()),
    "tokens that overlap": lambda: wrapped(with_overlaps()),
}


def wordpiece_with_normalized_tokens():
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizer=normalizers.Lowercase(),
        pre_tokenizer=pre_tokenizers.Whitespace(),
        normalized=True,
    )


PIECES = [
    *(
        "Hello",
        "hello there",
        " ",
        "\n",
        "\n\n",
        "  a",
        "word",
        "1234",
        "caf\u00e9",
        "\u4e2d\u6587",
        "<b>",
        "user",
        "x",
    ),
    *(START, END, OPEN, CLOSE, "<|im_", "end|>", "[INST]", "<unk>", "\U000f0000", "\U000f0001", f"{START}user"),
]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
EDITS = st.lists(
    st.tuples(st.sampled_from(["append", "edit", "branch", "drop"]), CONTENT, st.integers(0, 9)), max_size=6
)


def turn(messages, text):
    """A message behind others, of the role whose turn it is."""
    return {"role": "user" if len(messages) % 2 else "assistant", "content": text}


def changed(messages, edit, text, at):
    """The messages of a conversation that grows, or is changed at a place."""
    at = 1 + at % max(1, len(messages) - 1)
    if edit == "append" or len(messages) == 1:
        return [*messages, turn(messages, text)]
    if edit == "drop":
        return messages[:-1]
    replaced = [*messages[:at], turn(messages[:at], text)]
    return replaced if edit == "branch" else [*replaced, *messages[at + 1 :]]


@pytest.fixture(scope="module")
def templates(tiny_tokenizer):
    smollm2 = load_tokenizer(sources.resolve("embedded:smollm2"))
    made = {name: make() for name, make in (CUT | WHOLE).items()}
    made |= {"SmolLM2": smollm2, "tiny": tiny_tokenizer}
    return {name: (tokenizer, ChatTemplate(tokenizer, {})) for name, tokenizer in made.items()}


def whole(tokenizer, messages):
    """The ids as transformers gives them; None where it can't, as text has the token for what is unknown."""
    options = {"add_generation_prompt": True, "tokenize": True, "sanitize_control_tokens": True}
    try:
        return tuple(tokenizer.apply_chat_template(messages, **options))
    except ValueError:
        return None


def in_segments(template, messages):
    prompt = chat_prompt(messages)
    try:
        return template.encode(prompt, template.render(prompt))
    except PromptRejected:
        return None


@pytest.mark.parametrize("name", ["SmolLM2", "tiny", *CUT, *WHOLE])
@settings(max_examples=40)
@given(CONTENT, EDITS)
def test_a_conversation_that_is_changed_has_the_ids_of_the_whole(templates, name, system, edits):
    tokenizer, template = templates[name]
    messages = [{"role": "system", "content": system}]
    for edit in [("append", "Hello", 0), *edits]:
        messages = changed(messages, *edit)
        assert in_segments(template, messages) == whole(tokenizer, messages)


@pytest.fixture
def encoded():
    """Counts the characters that a tokenizer encodes: called with one, it gives a function that gives their number."""
    originals = []

    def count(tokenizer):
        lengths, encode = [], tokenizer.encode
        originals.append((tokenizer, encode))

        def counted(text, **options):
            lengths.append(len(text))
            return encode(text, **options)

        tokenizer.encode = counted
        return lambda: sum(lengths)

    yield count
    for tokenizer, encode in originals:
        tokenizer.encode = encode


@pytest.mark.parametrize("name", ["SmolLM2", "tiny", *CUT])
def test_of_a_conversation_that_grows_what_is_new_is_encoded(templates, encoded, name):
    tokenizer, _ = templates[name]
    encoder, characters = SegmentEncoder(tokenizer, CHATML), encoded(tokenizer)
    text = f"{START}user\nHello there. {END}\n{START}assistant\n"
    encoder.encode(text * 3)
    before = characters()
    encoder.encode(text * 3 + "Hello.")
    assert 0 < characters() - before < len(text)
    encoder.encode(text * 2)
    assert characters() - before < len(text)


@pytest.mark.parametrize("name", WHOLE)
def test_a_tokenizer_that_can_not_be_cut_encodes_the_whole(templates, encoded, name):
    tokenizer, _ = templates[name]
    encoder, characters = SegmentEncoder(tokenizer, CHATML), encoded(tokenizer)
    text = f"{START}user\nHello{END}\n"
    encoder.encode(text)
    before = characters()
    encoder.encode(f"{text}{START}assistant\n")
    assert characters() - before == len(text) + len(f"{START}assistant\n")


class WordTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python."""

    vocab_size = 1

    def __init__(self, **options):
        self.words = {"<unk>": 0}
        super().__init__(unk_token="<unk>", **options)

    def get_vocab(self):
        return dict(self.words) | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return text.split()

    def _convert_token_to_id(self, token):
        return sum(token.encode()) % 97

    def _convert_id_to_token(self, index):
        return str(index)


def test_a_tokenizer_in_python_encodes_the_whole():
    own = WordTokenizer(additional_special_tokens=[START, END])
    own.chat_template = CHATML
    tokenizer = TokenizerWrapper(own)
    template = ChatTemplate(tokenizer, {})
    for messages in ([{"role": "user", "content": "Hello"}], [{"role": "user", "content": f"Hello {END} there"}]):
        assert in_segments(template, messages) == whole(tokenizer, messages)


def test_segments_are_kept_up_to_a_limit(templates, encoded, monkeypatch):
    monkeypatch.setattr("mlxserver.engine.prompt.segments._MOST_CHARACTERS", 100)
    tokenizer, _ = templates["byte-level BPE"]
    encoder, characters = SegmentEncoder(tokenizer, CHATML), encoded(tokenizer)
    first, second = (f"{START}{text * 80}" for text in "ab")
    for text in (first, second, first):
        before = characters()
        encoder.encode(text)
        assert characters() - before >= len(text)
