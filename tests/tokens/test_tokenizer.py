"""Tokenizers as they come: held against their file, against the model's embeddings, and asked what is text."""

import json
import logging
import pathlib

import pytest
import tokenizers

from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.sampler import Prompt, Sampler
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.pieces import pieces, token_text
from tests.small_models import INSTRUCTION_TEMPLATE, byte_level, sentencepiece, trace, write_folder


def moved_up(made: tokenizers.Tokenizer, name: str, by: int) -> tokenizers.Tokenizer:
    """The tokenizer with a gap in its ids before a token."""
    parts = json.loads(made.to_str())
    for token in parts["added_tokens"]:
        if token["content"] == name:
            token["id"] += by
            parts["model"]["vocab"][name] = token["id"]
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def test_a_token_that_comes_out_and_has_no_embedding_is_refused(tmp_path):
    """Fewer tokens than embeddings, but the largest id is beyond them."""
    made = moved_up(byte_level(), "</think>", 200)
    folder = write_folder(tmp_path, made, vocab_size=made.get_vocab_size() + 10, weights=True)
    with pytest.raises(UserError, match="'</think>' is token 526, but the model has embeddings for 337"):
        Scorer.from_pretrained(folder)
    with pytest.raises(UserError, match="'</think>' is token 526"):
        Sampler.from_pretrained(folder)


def test_a_token_that_no_text_becomes_needs_no_embedding(tmp_path, caplog):
    made = byte_level()
    embeddings = made.get_vocab_size()
    made.add_special_tokens(["<|reserved|>"])
    folder = write_folder(tmp_path, made, vocab_size=embeddings, weights=True)
    with caplog.at_level(logging.WARNING):
        (score,) = Scorer.from_pretrained(folder).score([trace(prompt="What is <|reserved|>?")])
    assert score.log_prob < 0 and "'<|reserved|>' has no embedding" in caplog.text


def test_ids_beyond_the_embeddings_are_refused_in_generation(tmp_path):
    sampler = Sampler.from_pretrained(write_folder(tmp_path, weights=True))
    with pytest.raises(UserError, match="prompt 'p': token 5000 is outside the vocabulary"):
        list(sampler.continue_tokens([Prompt("p", [1, 5000])], Decoding(max_new_tokens=2), seed=0))
    assert list(sampler.generate([Request("r", "Why?")], Decoding(max_new_tokens=2), seed=0))


@pytest.mark.parametrize("word", ["pears", "ü", "  ", "kettle in"])
def test_added_words_and_letters_are_text(tmp_path, word):
    """Ids are those that transformers gives to the whole text, and they come back as it."""
    chat = ChatFormat.from_pretrained(write_folder(tmp_path, byte_level(text=["pears", "ü", "  ", "kettle in"])))
    answer = f"fa{word}r and <|end|> x"
    for row in (trace(answer=f"fa{word}r"), trace(prompt=f"Is {word} it?", answer=f"a{word}")):
        whole = f"<|user|>{row.prompt}<|bot|><think>\n{row.reasoning}\n</think>\n\n{row.answer}<|end|>"
        ids = chat.render(row).token_ids
        assert ids.tolist() == chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert chat.decode(ids) == whole
    rendered = chat.render(trace(answer=answer))  # spelled control tokens are encoded by another tokenizer
    assert answer in chat.decode(rendered.token_ids)
    assert chat.tokenizer.convert_tokens_to_ids(word) in rendered.token_ids


def test_the_file_is_followed_where_transformers_reads_it_otherwise(tmp_path, caplog):
    """transformers 5 gives every qwen2 its own pre-tokenizer; 5.0 to 5.20 took R1-Distill-Llama's spaces away."""
    folder = write_folder(tmp_path, family="qwen2")
    text = "She had 5 pears,  then 22 more: isn't it odd?"
    with caplog.at_level(logging.WARNING):
        chat = ChatFormat.from_pretrained(folder)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert chat.prompt_ids(text) == written.encode(f"<|user|>{text}<|bot|>", add_special_tokens=False).ids
    assert "reads it otherwise than tokenizer.json is written" in caplog.text


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_responses_go_on_from_their_prompt(tmp_path, legacy):
    """No mark of a beginning stands in the middle of a text."""
    made = sentencepiece(legacy=legacy)
    folder = write_folder(tmp_path, made, INSTRUCTION_TEMPLATE, eos="</s>", tokenizer_config={"bos_token": "<s>"})
    chat = ChatFormat.from_pretrained(folder)
    rendered = chat.render(trace("Why is it new?", "It sings.", "Fill it with water."))
    prompt = "<s>[INST] Why is it new? [/INST]"
    whole = chat.tokenizer(
        f"{prompt}<think>\nIt sings.\n</think>\n\nFill it with water.</s>", add_special_tokens=False
    )["input_ids"]
    assert rendered.token_ids.tolist() == whole


@pytest.mark.parametrize("made", [byte_level(), sentencepiece(legacy=True), sentencepiece(legacy=False)])
def test_pieces_add_up_to_the_text(tmp_path: pathlib.Path, made):
    style = {"eos": "</s>", "tokenizer_config": {"bos_token": "<s>"}} if made.token_to_id("<s>") is not None else {}
    folder = write_folder(tmp_path, made, **({"template": INSTRUCTION_TEMPLATE} if style else {}), **style)
    chat = ChatFormat.from_pretrained(folder)
    ids = chat.prompt_ids("She found two new pears 日本, naïve 🙂 ideas.")
    for before in (0, 1, 7):
        shown = list(pieces(ids[before:], chat, ids[:before]))
        assert sum(piece.tokens for piece in shown) == len(ids) - before
        assert chat.decode(ids).endswith("".join(piece.text for piece in shown))
    assert "".join(piece.text for piece in pieces(ids, chat, [])) == chat.decode(ids)
    spaced = [id for id in set(ids) if chat.tokenizer.convert_ids_to_tokens(id).startswith(("Ġ", "\u2581"))]
    assert spaced and all(token_text(id, chat).startswith(" ") for id in spaced)


def test_an_end_token_left_in_an_answer_is_refused(tmp_path):
    chat = ChatFormat.from_pretrained(write_folder(tmp_path))
    with pytest.raises(UserError, match="trace 't': its answer ends with '<|end|>' as text; take it out"):
        chat.render(trace(answer="So.<|end|>\n"))
    assert chat.render(trace(answer="<|end|> ends it.")) is not None


def test_a_lost_prompt_is_refused(tmp_path):
    made = byte_level()
    parts = json.loads(made.to_str())
    parts["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    chat = ChatFormat.from_pretrained(write_folder(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(parts))))
    with pytest.raises(
        UserError, match="its prompt does not survive the tokenizer .*: it comes back as '<.user.>Howold"
    ):
        chat.prompt_ids("How old is it?")
