"""Other implementations of the same two operations, where they are installed and the device is theirs."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import harness
import jax
import jax.numpy as jnp
from dgr_kernels.attention import Visibility, attention


class Rival(NamedTuple):
    """A function of (q, k, v, *extra) with q [B,T,N,H] and k, v [B,T,K,H].

    Attributes:
      extra: what belongs to the batch and is made outside of what is timed, as our lists are: a mask [B,1,T,T].
      backward: whether it has a gradient.
    """

    name: str
    call: Callable[..., jax.Array]
    extra: tuple[Any, ...] = ()
    backward: bool = True


def attention_rivals(visibility: Visibility, segment_ids: jax.Array | None, causal: bool) -> Iterator[Rival]:
    """Those that compute the attention of a visibility.

    Args:
      visibility: of [B, T].
      segment_ids: where the visibility is packed sequences.
      causal: whether it is the plain causal triangle.
    """
    platform = jax.default_backend()
    mask = visibility.mask(visibility.own_start.shape[1])[:, None]

    def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, implementation: Literal["xla", "cudnn"]):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    yield Rival("XLA with a mask", functools.partial(masked, implementation="xla"), (mask,))
    if platform == "gpu":
        yield Rival("cuDNN with a mask", functools.partial(masked, implementation="cudnn"), (mask,))
        if causal:
            yield Rival("cuDNN", functools.partial(attention, visibility=visibility, implementation="cudnn"))
            yield Rival("jax's Hopper example", _hopper_example, backward=False)
    if platform == "tpu" and (causal or segment_ids is not None):
        yield Rival("jax's TPU flash", functools.partial(_tpu_flash, segment_ids=segment_ids))
        splash = functools.partial(attention, visibility=visibility, implementation="splash")
        yield Rival("jax's TPU splash", splash)
    if importlib.util.find_spec("tokamax"):
        yield Rival("tokamax", _tokamax_attention, () if causal else (mask,))


def cudnn_or_xla_rows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal rows through the device's best public attention: what sharing a prefix replaces."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def _hopper_example(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    q, k, v = (x.astype(jnp.float16) for x in (q, k, v))  # its shared memory is declared float16
    example: Any = attention_mgpu.attention
    return example(q, k, v, config)


def _tpu_flash(q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    group = q.shape[2] // k.shape[2]  # it wants as many kv heads as query heads
    q, k, v = (x.swapaxes(1, 2) for x in (q, k.repeat(group, 2), v.repeat(group, 2)))
    ids = None if segment_ids is None else flash.SegmentIds(segment_ids, segment_ids)
    sizes = flash.BlockSizes(**dict.fromkeys(
        ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv",
         "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq"), 512), block_b=1)  # fmt: skip
    scale = q.shape[-1] ** -0.5
    out = flash.flash_attention(q, k, v, segment_ids=ids, causal=True, sm_scale=scale, block_sizes=sizes)
    return out.swapaxes(1, 2)


def _tokamax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    tokamax = importlib.import_module("tokamax")
    return tokamax.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)


def tokamax_scores(hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of each token: minus our log-probability."""
    tokamax = importlib.import_module("tokamax")
    return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, unembed.T, reduction="none")


def torch_contenders(
    name: str, work: harness.Work, forward: Callable[..., Any], inputs: Any, by: Sequence[int]
) -> Iterator[harness.Contender]:
    """A function of torch's `functional` and tensors, with its gradient; nobody where there is no torch for the device.

    Args:
      by: of the leading arguments.
    """
    if importlib.util.find_spec("torch") is None or jax.default_backend() == "tpu":
        return
    torch: Any = importlib.import_module("torch")  # by name: the type checker runs where it is not installed
    on_gpu = torch.cuda.is_available()
    if jax.default_backend() == "gpu" and not on_gpu:
        return
    call = functools.partial(forward, torch.nn.functional)

    def both(*tensors: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in tensors[: len(by)]]
        return torch.autograd.grad(call(*leaves, *tensors[len(by) :]).float().sum(), leaves)

    def tensor(x: jax.Array) -> Any:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if x.dtype == jnp.bfloat16:
            return torch.tensor(jax.device_get(x.astype(jnp.float32))).to(device, torch.bfloat16)
        return torch.tensor(jax.device_get(x)).to(device)

    tensors = [tuple(map(tensor, arrays)) for arrays in inputs]
    wait = lambda _: torch.cuda.synchronize() if on_gpu else None  # noqa: E731
    yield from harness.both_ways(name, work._replace(compare=False), call, both, tensors, wait=wait)


def torch_attention(functional: Any, q: Any, k: Any, v: Any) -> Any:
    """Causal SDPA."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def torch_scores(functional: Any, hidden: Any, unembed: Any, targets: Any) -> Any:
    """Plain cross entropy over logits."""
    return functional.cross_entropy((hidden @ unembed.T).float(), targets.long(), reduction="none")
