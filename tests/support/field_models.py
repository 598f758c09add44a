"""Models of the field cases (tests/system/test_field_cases.py), by the key under which they are served."""

from tests.support.architectures import write_random_model
from tools.harness.models import scripted_model, tiny_llama

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
STRICT = (
    "{%- for m in messages %}{%- if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message has to be the first') }}{%- endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
RECURRENT = {
    "model_type": "qwen3_5",
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
SLIDING = {"model_type": "gemma3_text", "sliding_window": 48, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
CHANNELS = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>", "<|constrain|>")
TALES = {
    "say": "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>Hello there.",
    "use": '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}',
}
WORDS = " ".join(f"word{number}" for number in range(120))


def _note(**values):
    """A call in XML, as Qwen3-Coder writes it."""
    lines = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<tool_call>\n<function=note>\n{lines}</function>\n</tool_call>"


NOTES = {
    "bigint": _note(id=1234567890123456789),
    "bignumber": _note(size=9007199254740993),
    "digits": _note(title=123),
    "braces": _note(title='{"a": 1}'),
    "word": _note(text="null"),
    "fine": _note(id=7, text="a\nb"),
    "long": _note(text=WORDS),
}


def write_models(directory):
    """Fields of the configuration of each model, which is written into the directory."""
    thinking = {"generation_prompt": "<think>\n", "tokens": ("<think>", "</think>")}
    thoughts = {
        "closed": f"Let me look.\n</think>\n\n{CALL}",
        "open": f"Let me look.\n{CALL}",
        "sum": "It is a sum. The answer is 42.",
    }
    paths = {
        "recurrent": write_random_model(directory / "recurrent", RECURRENT),
        "sliding": write_random_model(directory / "sliding", SLIDING),
        "plain": tiny_llama(directory / "plain", context=4096),
        "strict": tiny_llama(directory / "strict", template=STRICT),
        "thinker": scripted_model(directory / "thinker", thoughts, **thinking),
        "caller": scripted_model(directory / "caller", {"call": CALL, "cut": CALL}),
        "xml": scripted_model(directory / "xml", NOTES, history="xml", context=20_000),
        "channels": scripted_model(directory / "channels", TALES, tokens=CHANNELS),
    }
    types = {"strict": "thinking", "thinker": "thinking", "caller": "instruction", "xml": "instruction"}
    models = {
        key: {"source": str(path)} | ({"type": types[key]} if key in types else {}) for key, path in paths.items()
    }
    return {"smollm2": {"source": "embedded:smollm2"}, **models}
