"""A model of lm_eval (the Language Model Evaluation Harness) on our scorer and sampler; needs no PyTorch.

    python scripts/lm_eval.py --model dgr_jax --model_args pretrained=DIR --tasks ...

It answers what lm_eval's own Hugging Face backend answers: tokenisation, truncation from the left, rolling windows and
stop sequences follow that backend. Contexts that several continuations share, or few-shot examples that several
contexts do, are computed once.
"""

import collections
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from dgr_jax.errors import UserError, shown
from dgr_jax.generation.engine import Decoding
from dgr_jax.generation.sampler import Prompt, Sampler
from dgr_jax.models.folder import local_folder
from dgr_jax.models.sharding import mesh_or_none
from dgr_jax.models.weights import from_pretrained
from dgr_jax.run.files import read_json
from dgr_jax.run.progress import Progress
from dgr_jax.scoring.scorer import Scorer, SequenceScores
from dgr_jax.tokens.packing import TokenSequence
from dgr_jax.tokens.tokenizer import check_ids, check_vocabulary, load_tokenizer

_MAX_GEN_TOKS = 256

_SERVED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
"""What a task may ask of generation, after lm_eval has settled their names."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "length_penalty": (1.0,), "typical_p": (1.0,),
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_p": (0.0,), "presence_penalty": (0.0,), "frequency_penalty": (0.0,),
    "penalty_alpha": (0.0,), "diversity_penalty": (0.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "early_stopping": (False,), "renormalize_logits": (False,), "use_cache": (True,),
}  # fmt: skip
"""Arguments of other backends -> the values with which they change nothing."""
_PENALTIES = ("repetition_penalty", "no_repeat_ngram_size", "num_beams", "encoder_repetition_penalty", "min_p")
"""Of those, what lm_eval's Hugging Face backend takes from a model's generation_config.json even when it is greedy."""


class DgrJax(TemplateLM):
    """lm_eval's `--model dgr_jax`.

    Args:
      pretrained: Hugging Face folder or hub id.
      dtype, mesh, implementation: as the scripts' flags of these names.
      peft: folder of an adapter, as the scripts' --adapter; lm_eval's own backend calls it so.
      max_length: longest sequence; by default the model's positions.
      max_gen_toks: longest generation where a task does not say.
      batch_size: rows generated at a time; scoring packs by tokens instead.
      tokens_per_batch, share_prefixes: as `Scorer`.
      add_bos_token: whether text begins with a beginning-of-sequence token; by default as the tokenizer does.
      prefix_token_id: what stands before a text without context; by default the tokenizer's first or last token.
      enable_thinking: passed on to the chat template where it is given.
      chat_template_args: more of what is passed on to it.
      think_end_token: what is generated up to its last occurrence is dropped; a text, or a token's id.
      seed: of sampling.
      max_batch_size, device: accepted, as lm_eval passes them; a device is JAX's choice (JAX_PLATFORMS).

    Raises:
      UserError: a model or tokenizer that cannot be loaded, or an argument that is not known.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str | None = None,
        mesh: str = "auto",
        implementation: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        tokens_per_batch: int | None = None,
        share_prefixes: bool = True,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        think_end_token: str | int | None = None,
        peft: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        del max_batch_size, device
        if unknown:
            raise UserError(f"model argument {min(unknown)!r} is not known; the docstring of DgrJax lists what is")
        whole = {"max_length": max_length, "max_gen_toks": max_gen_toks, "tokens_per_batch": tokens_per_batch}
        _check_type(int, **whole, prefix_token_id=prefix_token_id, seed=seed)
        _check_type(bool, share_prefixes=share_prefixes, add_bos_token=add_bos_token, enable_thinking=enable_thinking)
        _check_type(dict, chat_template_args=chat_template_args)
        _check_type(str, pretrained=pretrained, dtype=dtype, mesh=mesh, implementation=implementation, peft=peft)
        folder = local_folder(pretrained)
        devices = mesh_or_none(mesh)
        model = from_pretrained(folder, mesh=devices, dtype=dtype, implementation=implementation, adapter=peft)
        self.tokenizer, eos_token_ids = load_tokenizer(folder)
        check_vocabulary(self.tokenizer, model.config.vocab_size, pretrained)
        self.max_length = max_length or model.config.max_positions
        self.scorer = Scorer(
            model, None, mesh=devices, tokens_per_batch=tokens_per_batch, share_prefixes=share_prefixes
        )
        rows = str(batch_size)  # lm_eval says 1 where nobody said anything, and "auto" at times
        rows = int(rows) if rows.isdecimal() and rows != "1" else None
        self.sampler = Sampler(model, None, eos_token_ids=eos_token_ids, mesh=devices, batch_size=rows)
        self._max_gen_toks, self._add_bos_token, self._prefix_token_id = max_gen_toks, add_bos_token, prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._chat_template_args["enable_thinking"] = enable_thinking
        self._seed, self._pretrained = seed, pretrained
        self._think_end_token, self._think_end_id = self._think_end(think_end_token)
        file = folder / "generation_config.json"
        own = read_json(file) if file.exists() else {}
        self._own_penalties = {name: own[name] for name in _PENALTIES if own.get(name) is not None}

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm_eval's caches."""
        return self._pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; text that already begins with the prefix token gets no second one."""
        if add_special_tokens is None:
            begins = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if begins else self._add_bos_token
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text of the model's chat template; without its system turn where that is refused."""
        import jinja2

        def apply(history: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_template_args,
            )

        try:
            return apply(chat_history)
        except jinja2.TemplateError:
            return apply([turn for turn in chat_history if turn["role"] != "system"])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows that score each token once."""
        windows: list[TokenSequence] = []
        counts = []
        for request in requests:
            (text,) = request.args
            rolled = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            parts = [self._sequence(*utils.make_disjoint_window(part)) for part in rolled]
            windows += parts
            counts.append(len(parts))
        scores = iter(self._score(windows, disable_tqdm))
        found = []
        for request, count in zip(requests, counts, strict=True):
            total = sum(_total(score) for score in itertools.islice(scores, count))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **of_other_backends: Any,
    ) -> list[tuple[float, bool]]:
        del of_other_backends
        scores = self._score([self._sequence(context, text) for _, context, text in requests], disable_tqdm)
        found = [(_total(score), bool(score.is_greedy.all())) for score in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _sequence(self, context: list[int], continuation: list[int]) -> TokenSequence:
        """Cut on the left to what fits: the model is given all tokens but the last."""
        if not context or not continuation or len(continuation) > self.max_length:
            raise UserError(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; both must be there, "
                f"and no more than max_length={self.max_length} can be scored"
            )
        ids = np.array((context + continuation)[-(self.max_length + 1) :], np.int32)
        return TokenSequence(ids, np.arange(len(ids)) >= len(ids) - len(continuation))

    def _score(self, sequences: Sequence[TokenSequence], disable_tqdm: bool) -> list[SequenceScores]:
        with Progress("loglikelihood", len(sequences), "requests") as progress:
            return list(self.scorer.score_sequences(sequences, None if disable_tqdm else progress.advance))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until a stop sequence, or the end-of-sequence token, or enough tokens."""
        arguments: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]  # pyright: ignore[reportAssignmentType]
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for number, (_, kwargs) in enumerate(arguments):
            groups[json.dumps(kwargs, sort_keys=True, default=str)].append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            texts = self._generate([arguments[i][0] for i in numbers], arguments[numbers[0]][1])
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", arguments[number], text)
        return found

    def _generate(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self._max_gen_toks))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.get("until"), eos=eos)
        most = kwargs["max_gen_toks"]
        if most >= self.max_length:
            raise UserError(f"max_gen_toks={most} leaves no room for a context; max_length is {self.max_length}")
        for name, value in {**self._own_penalties, **kwargs}.items():
            if name not in _SERVED and value is not None and value not in _NEUTRAL.get(name, ()):
                source = "the task" if name in kwargs else "the model's generation_config.json"
                neutral = f"--gen_kwargs {name}={_NEUTRAL[name][0]} does without" if name in _NEUTRAL else "take it out"
                raise UserError(
                    f"generation argument {name}={shown(value)}, of {source}, is not implemented; {neutral}"
                )
        sampled = bool(kwargs.get("do_sample"))
        decoding = Decoding(
            temperature=_number("temperature", kwargs.get("temperature"), 0.0) if sampled else 0.0,
            top_p=_number("top_p", kwargs.get("top_p"), 1.0) if sampled else 1.0,
            top_k=int(_number("top_k", kwargs.get("top_k"), 0)) if sampled else 0,
            max_new_tokens=most,
        )
        seen = collections.Counter[str]()
        prompts: list[Prompt] = []
        for context in contexts:
            # A row is named by its context, so that its random stream does not depend on the other rows.
            digest = hashlib.sha256(context.encode()).hexdigest()
            ids = self.tok_encode(context)[-(self.max_length - most) :]
            prompts.append(Prompt(f"{digest}/{seen[digest]}", ids))
            seen[digest] += 1

        def is_done(ids: list[int]) -> bool:
            rest = self._after_thinking(ids)
            if rest is None:
                return False
            text = self._text(rest, special=True)
            if self._think_end_token:
                _, closed, text = text.rpartition(self._think_end_token)
                if not closed:
                    return False
            return any(term in text for term in until if term)

        found = self.sampler.continue_tokens(prompts, decoding, seed=self._seed, stop=is_done)
        texts = {generated.prompt.id: self._answer(generated.token_ids, until) for generated in found}
        return [texts[prompt.id] for prompt in prompts]

    def _think_end(self, given: str | int | None) -> tuple[str | None, int | None]:
        """What ends the thinking: a text, or a token that text without special tokens would not show."""
        if given is None or given == "":
            return None, None
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise UserError(f"model argument think_end_token is {given!r}; give the token's text or its id")
        if isinstance(given, str) and not given.isdecimal():
            added = self.tokenizer.added_tokens_decoder.items()
            id = next((id for id, token in added if token.special and token.content == given), None)
            return (given, None) if id is None else (None, id)
        check_ids([int(given)], self.scorer.model.config.vocab_size, "model argument think_end_token")
        return None, int(given)

    def _after_thinking(self, ids: list[int]) -> list[int] | None:
        """The tokens behind the last one that ends the thinking; None where none does."""
        if self._think_end_id is None:
            return ids
        ends = [place for place, id in enumerate(ids) if id == self._think_end_id]
        return ids[ends[-1] + 1 :] if ends else None

    def _text(self, ids: Sequence[int], *, special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    def _answer(self, ids: list[int], until: Sequence[str]) -> str:
        """The text of a generation, without its thinking, up to the first stop sequence."""
        rest = self._after_thinking(ids)
        kept = ids if rest is None else rest
        # A stop sequence with a special token is seen in the tokens alone: the text is read without those.
        for term in until:
            if term and term not in self._text(kept, special=False) and term in self._text(kept, special=True):
                kept = kept[: next(n for n in range(len(kept) + 1) if term in self._text(kept[:n], special=True))]
                while term in self._text(kept, special=True):
                    kept = kept[:-1]
        text = self._text(kept, special=False)
        text = text if self._think_end_id is None or rest is None else text.lstrip()
        return postprocess_generated_text(text, stop=list(until), think_end_token=self._think_end_token)


def _check_type(kind: type, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and type(value) is not kind:
            wanted = {int: "a whole number", bool: "True or False", dict: "an object", str: "a text"}[kind]
            raise UserError(f"model argument {name} is {shown(value)}; give {wanted}")


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"generation argument {name} is {shown(value)}; give a number of 0 or more")
    return float(value)


def _total(score: SequenceScores) -> float:
    return float(score.log_probs.sum(dtype=np.float64))
