"""The same requests through lm_eval's own Hugging Face backend and through ours."""

import importlib
import itertools

import pytest
from lm_eval.api.instance import Instance

from dgr_jax.evaluation.lm_eval import DgrJax
from tests.evaluation.lm_eval_cases import ROWS

pytestmark = pytest.mark.parity
LONGEST = 60


def instances(kind: str, arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def backends(tiny_lrm):
    huggingface = importlib.import_module("lm_eval.models.huggingface")
    theirs = huggingface.HFLM(pretrained=str(tiny_lrm), device="cpu", dtype="float32", batch_size=4, max_length=LONGEST)
    return DgrJax(str(tiny_lrm), max_length=LONGEST), theirs


def test_loglikelihood(backends):
    pairs = [(row["prompt"], choice) for row in ROWS for choice in row["choices"]]
    pairs += [("", "The nurse is kind."), ("It is ", "so"), (ROWS[-1]["text"], " and so on."), ("x", " Tom has")]
    # Continuations that the model would choose itself, so that greedy flags differ.
    for prompt in (row["prompt"] for row in ROWS):
        text = backends[1].generate_until(instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 4})]))[0]
        pairs += [(prompt, text)] if text else []
    found, expected = (b.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for b in backends)
    for (ours, our_greedy), (theirs, their_greedy) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4) and our_greedy == their_greedy
    assert len({greedy for _, greedy in found}) == 2


def test_loglikelihood_rolling(backends):
    texts = [(row["text"],) for row in ROWS]
    found, expected = (b.loglikelihood_rolling(instances("loglikelihood_rolling", texts), True) for b in backends)
    for ours, theirs in zip(found, expected, strict=True):
        # Theirs is a sum in float32, whose last bit is worth as much at 1,000 nats.
        assert ours == pytest.approx(theirs, abs=1e-4 + abs(theirs) * 2**-23)


def test_generate_until(backends):
    kinds = ({"until": ["."], "max_gen_toks": 20}, {"until": ["apples", "\n"], "max_gen_toks": 12})
    asked = [(row["prompt"], kwargs) for row, kwargs in itertools.product(ROWS, kinds)]
    found, expected = (b.generate_until(instances("generate_until", asked), disable_tqdm=True) for b in backends)
    assert found == expected and any(found)


def test_chat_template(backends):
    history = [{"role": "user", "content": "What is two and two?"}]
    texts = [b.apply_chat_template(history) for b in backends]
    assert texts[0] == texts[1] and "What is two and two?" in texts[0]
    assert backends[0].tok_encode(texts[0]) == backends[1].tok_encode(texts[1])
