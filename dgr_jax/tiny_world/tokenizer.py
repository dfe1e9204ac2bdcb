"""The tiny world's tokenizer: byte-level BPE in which each word of the world and each small number is one token."""

import collections
import json
import pathlib
from collections.abc import Iterable

SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>")
PAD, END = "<|pad|>", "<|end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}<|user|>{{ message.content }}
{%- elif message.role == 'system' -%}{{ message.content }}
{%- elif message.role == 'assistant' -%}
<|assistant|>{{ message.content.split('</think>')[-1].lstrip('\\n') }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
"""Like the templates of real LRMs it drops the thinking of finished turns; `<think>` is the model's to write."""

LARGEST_NUMBER = 99


def build_tokenizer(texts: Iterable[str], folder: pathlib.Path, *, least: int = 3) -> int:
    """Trains the tokenizer and writes its Hugging Face files.

    Args:
      texts: sample of the corpus.
      folder: existing folder that receives tokenizer.json, tokenizer_config.json and chat_template.jinja.
      least: a word seen at least so often becomes one token.

    Returns:
      The number of tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    for number in range(LARGEST_NUMBER + 1):
        counts[f"Ġ{number}"] += least
    # Equal counts: the trainer then merges until each word is whole, with no regard to frequency.
    vocabulary = sorted(word for word, count in counts.items() if count >= least)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    plain = (word.replace("Ġ", " ").replace("Ċ", "\n") for word in vocabulary)
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": ["<|user|>", "<|assistant|>"],
        "model_max_length": 32_768,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size()
