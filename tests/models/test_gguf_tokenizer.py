"""Tokenizers rebuilt from a GGUF file's metadata: beside the one that the model's authors published."""

import json
import pathlib

import pytest
import transformers

from dgr_jax.errors import UserError
from dgr_jax.models.gguf_tokenizer import write_tokenizer
from tests.small_models import byte_level

TEXTS = [
    "It's 12 o'clock;  naïve\tquestion?\n\nYes (3.14 + 2,718 == x_1)  日本語 – для всех 🙂\n  if a != b:\n    f(a)",
    "  leading", "trail  ", "\r\n\r\n x", "<|im_start|>user\nhi<|im_end|>", "don't WON'T I'LL", "1234567890 12,345.67",
    "a\u0301 e\u0301", "\u00a0nbsp", "\t\ttabs", "한국어 👩‍👩‍👧‍👦", "<think>\nso\n</think>", "ﬁ ½ 𝒜",
]  # fmt: skip


def said(pre: str, /, **changed) -> dict:
    """Metadata of a small vocabulary."""
    made = json.loads(byte_level().to_str())
    ids = made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    special = {token["content"]: token["special"] for token in made["added_tokens"]}
    found = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(merge) for merge in made["model"]["merges"]],
        "token_type": [{True: 3, False: 4, None: 1}[special.get(token)] for token in tokens],
        "eos_token_id": ids["<|end|>"], "bos_token_id": ids["<|pad|>"],
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in (found | changed).items()}


def rebuilt(metadata: dict, folder: pathlib.Path):
    write_tokenizer(metadata, folder, where="model.gguf")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_qwens_own(dgr_data, tmp_path):
    """151,669 tokens, and as many ids as the embedding has rows: the rest are unused."""
    folder = dgr_data / "models" / "qwen3_tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__) + [token["content"] for token in added.values()]
    kinds = [1] * len(vocabulary) + [3 if token["special"] else 4 for token in added.values()]
    spare = [f"[PAD{i}]" for i in range(len(tokens), 151_936)]
    metadata = {
        "model": "gpt2", "pre": "qwen2", "tokens": tokens + spare, "token_type": kinds + [5] * len(spare),
        "merges": [line for line in merges if line and not line.startswith("#version")], "eos_token_id": 151_645,
    }  # fmt: skip
    ours = rebuilt({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs) == 151_669
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_digits(tmp_path):
    """Apart in two of them, and at most three together in the other."""
    for pre, most in (("qwen2", 1), ("smollm", 1), ("llama-bpe", 3)):
        folder = tmp_path / pre
        folder.mkdir()
        tokenizer = rebuilt(said(pre), folder)
        split = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x 1234567")]
        assert max(len(part.strip("Ġ")) for part in split if any(map(str.isdigit, part))) == most
        for text in TEXTS[:4]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_first_token_where_the_file_asks_for_it(tmp_path):
    for asked in (True, False):
        folder = tmp_path / str(asked)
        folder.mkdir()
        tokenizer = rebuilt(said("llama-bpe", add_bos_token=asked), folder)
        assert (tokenizer.encode("hi")[0] == tokenizer.convert_tokens_to_ids("<|pad|>")) == asked


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pre": "gpt-4o"}, "pre-tokenizer 'gpt-4o'; only gpt2 with qwen2, smollm, llama-bpe is implemented: take the"),
        ({"model": "llama"}, "its tokenizer is 'llama' with"),
        ({"tokens": None}, "tokens, token_type or merges of its tokenizer are missing"),
        ({"token_type": [1]}, "its tokens are not told apart"),
        ({"tokens": ["a"] * 9, "token_type": [1] * 9}, "its tokens are not told apart"),
        ({"tokens": ["a"], "token_type": [6]}, "has tokens of kind 6"),
    ],
)
def test_what_is_no_such_tokenizer_is_said(tmp_path, changed, message):
    with pytest.raises(UserError) as error:
        write_tokenizer(said("qwen2", **changed), tmp_path, where="model.gguf")
    assert message in str(error.value) and not list(tmp_path.iterdir())
