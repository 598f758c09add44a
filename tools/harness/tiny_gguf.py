"""Real .gguf file of a random two-layer llama, which converts in a second."""

import itertools

import gguf
import numpy as np

HIDDEN, HEADS, LAYERS, CONTEXT = 64, 2, 2, 128


def write_tiny_gguf(path, *, seed=0, hidden=HIDDEN, types=()):
    """Write the file; its path. The vocabulary is the 256 bytes and four chat tokens.

    types: of the matrices, in turns, as gguf.GGMLQuantizationType names them; float32 without.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocabulary = _vocabulary(writer)
    turns = itertools.cycle(types or ("F32",))
    for name, array in _weights(vocabulary, hidden, np.random.default_rng(seed)):
        kind = gguf.GGMLQuantizationType[next(turns) if array.ndim == 2 else "F32"]
        writer.add_tensor(name, _encoded(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer):
    """Write a byte-level tokenizer; the number of its tokens."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*specials, *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(specials) + [gguf.TokenType.NORMAL] * (len(letters) + 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    return len(tokens)


def _encoded(array, kind):
    """The array in blocks of a type; of Q4_K, which gguf only decodes, blocks of some values."""
    if kind != gguf.GGMLQuantizationType.Q4_K:
        return gguf.quants.quantize(array, kind)
    blocks = np.random.default_rng(array.size).integers(0, 256, (array.size // 256, 144), dtype=np.uint8)
    blocks[:, :4] = np.array([0.001, 0.004], np.float16).view(np.uint8)
    return blocks.reshape(len(array), -1)


def _weights(vocabulary, hidden, random):
    def matrix(*shape):
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    yield "token_embd.weight", matrix(vocabulary, hidden)
    yield "output_norm.weight", np.ones(hidden, np.float32)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            yield f"blk.{layer}.{name}.weight", matrix(hidden, hidden)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32)
