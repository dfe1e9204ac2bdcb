"""How many rows are decoded at a time, and what is said where none can be."""

import types

import pytest

from dgr_jax.errors import UserError
from dgr_jax.generation import sampler as sampling
from dgr_jax.generation.decode import Programs
from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.sampler import Prompt, Sampler
from dgr_jax.generation.seats import Seats, bytes_a_row
from dgr_jax.models.config import ModelConfig

QWEN3_06B = ModelConfig(
    "qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, tie_embeddings=True, qk_norm=True, max_positions=40_960
)
GIB = 2**30


def mesh(platform="tpu", **sizes):
    shape = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    devices = types.SimpleNamespace(flat=[types.SimpleNamespace(platform=platform)])
    return types.SimpleNamespace(shape=shape, devices=devices)


def fitting(free, most=10_000, slots=4608, prompt=512, **sizes) -> Seats:
    return Seats.fitting(QWEN3_06B, mesh(**sizes), "bfloat16", slots, prompt, int(free), most)


def test_a_row_takes_at_least_its_cache():
    of_cache = 2 * 28 * 8 * 128 * 2 * 4608
    assert of_cache < bytes_a_row(QWEN3_06B, None, "bfloat16", 4608, 512) < 1.1 * of_cache


@pytest.mark.parametrize("free", [1, 3, 14, 30, 90])
def test_no_more_rows_than_memory_holds(free):
    seats = fitting(free * GIB)
    each = bytes_a_row(QWEN3_06B, mesh(), "bfloat16", 4608, 512)
    assert seats.batch * each < free * GIB < 1.4 * (seats.batch + 1) * each + GIB
    assert seats.batch % 4 == 0 or seats.batch < 4
    assert seats.prefill == -(-seats.batch // 4) and seats.slots == 4608


def test_more_devices_hold_more_rows():
    one = fitting(14 * GIB).batch
    assert fitting(14 * GIB, data=8).batch == 8 * one
    # Cut over fsdp, a layer's weights and the vocabulary's are gathered when it is their turn: .33 GiB.
    assert 7.6 * one < fitting(14 * GIB, fsdp=8).batch <= 8 * one
    assert 1.9 * one < fitting(14 * GIB, tensor=2).batch <= 2.2 * one
    # Eight heads are not cut by three: every device has the whole cache.
    assert fitting(14 * GIB, tensor=3).batch <= one


def test_no_more_rows_than_there_are():
    assert fitting(90 * GIB, most=10).batch == 12
    assert fitting(90 * GIB, most=10, fsdp=8).batch == 16


def test_a_cpu_decodes_as_many_as_it_did():
    cpu = dict(platform="cpu")
    assert Seats.fitting(QWEN3_06B, mesh(**cpu), "float32", 128, 64, 10**12, 10_000).batch == 64
    assert fitting(10**12).batch == 256


def test_not_even_one_row_is_an_error_with_advice():
    with pytest.raises(
        UserError, match=r"a row of 40960 tokens takes \d\.\d\d GiB beside the weights, and a device has"
    ):
        fitting(GIB, slots=40_960)


@pytest.mark.parametrize(("asked", "ways", "batch", "prefill"), [(1, 1, 1, 1), (64, 1, 64, 16), (10, 8, 16, 8)])
def test_what_is_asked_for_is_what_the_mesh_divides(asked, ways, batch, prefill):
    assert Seats.of(asked, 99, mesh(fsdp=ways)) == (batch, prefill, 99, ways)


def test_rows_are_dealt_to_all_devices_and_let_in_where_they_sit():
    """What is prefilled on a device stays there, whatever is free."""
    seats = Seats.of(32, 99, mesh(fsdp=4))
    assert (seats.prefill, seats.dealt(range(32))[:6]) == (8, [0, 8, 16, 24, 1, 9])
    places = seats.dealt([0, 1, 2, 3, 4, 9, 30])
    assert places == [0, 9, 30, 1, 2, 3, 4]
    newcomers = [(place, Prompt(str(place), [1] * (40 - place), 0)) for place in places]
    groups = list(sampling._admissions(newcomers, seats))
    assert [sorted(place for place, _ in group.values()) for group in groups] == [[3, 4, 9, 30], [1, 2], [0]]
    for group in groups:
        assert all(seats.part_of(place) == number // 2 for number, (place, _) in group.items())
        assert len(group) <= 8 and set(group) <= set(range(8))


def test_lack_of_memory_is_an_error_with_advice(random_model, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 71 GiB")

    monkeypatch.setattr(sampling, "programs", lambda _: Programs(exhausted, exhausted))
    sampler = Sampler.from_pretrained(random_model, batch_size=8, show_progress=False)
    with pytest.raises(UserError, match=r"too little memory: RESOURCE_EXHAUSTED.*8 rows of 64 tokens.*`batch_size`=4,"):
        list(sampler.generate([Request("a", "Hello")], Decoding(max_new_tokens=32), seed=0))


def test_another_error_of_the_device_is_no_lack_of_memory(random_model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(sampling, "programs", lambda _: Programs(broken, broken))
    sampler = Sampler.from_pretrained(random_model, batch_size=8, show_progress=False)
    with pytest.raises(RuntimeError, match="a bug"):
        list(sampler.generate([Request("a", "Hello")], Decoding(max_new_tokens=32), seed=0))


def test_the_sampler_says_what_it_chose(random_model, monkeypatch, capsys):
    monkeypatch.setattr("dgr_jax.run.progress._REDRAW_EVERY", 0)
    sampler = Sampler.from_pretrained(random_model)
    rows = [Request(str(n), "Hello") for n in range(3)]
    list(sampler.generate(rows, Decoding(max_new_tokens=4), seed=0))
    assert "generate, 4 at a time" in capsys.readouterr().err
