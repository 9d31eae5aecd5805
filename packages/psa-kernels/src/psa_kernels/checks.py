"""Argument checks shared by all operators: each error says the argument, the rule and what came."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.forward_ad import unpack_dual

MAX_BLOCK = 256
MAX_HEAD_DIM = 256
"""Of the Triton implementations of attention, k-means and leading directions: the widest rows that registers hold."""
IMPLS = ("triton", "torch", "reference")
AUTO = "auto"
MIN_CAPABILITY = (8, 0)  # bfloat16 on tensor cores, asynchronous copies
HOPPER = (9, 0)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_warned_of_old_gpu = False


def integer(name: str, value: object) -> int | torch.SymInt:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    return value


def positive_int(name: str, value: object) -> None:
    if integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def power_of_two(name: str, value: int) -> None:
    positive_int(name, value)
    if value & (value - 1) or value > MAX_BLOCK:
        raise ValueError(f"{name} must be a power of two of at most {MAX_BLOCK}, got {value}")


def level_count(num_levels: int, block_kv: int) -> None:
    positive_int("num_levels", num_levels)
    if num_levels > block_kv.bit_length():
        raise ValueError(
            f"num_levels must be at most log2(block_kv) + 1 = {block_kv.bit_length()}, where a block is one row, "
            f"got {num_levels} with block_kv {block_kv}"
        )


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def resolve_impl(impl: str | None, tensor: Tensor) -> str:
    """What an operator is given as ``impl``: the name, else ``"auto"`` on a GPU and ``"torch"`` elsewhere.

    Which implementation ``"auto"`` is stays open until the operator runs, see :func:`impl_to_run`: torch.compile
    traces this function, and a graph should hold neither a query of the device nor a warning.
    """
    if impl is None:
        return AUTO if tensor.device.type == "cuda" else "torch"
    choice("impl", impl, IMPLS)
    return impl


def gpu_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU, None for other devices. Waits for nothing: torch keeps it."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def is_hopper(device: torch.device) -> bool:
    """Whether ``device`` is an NVIDIA GPU of capability 9.0, whose tensor cores take operands from shared memory; AMD
    numbers its own otherwise."""
    return torch.version.hip is None and gpu_capability(device) == HOPPER


def impl_to_run(impl: str, device: torch.device) -> str:
    """The implementation that an operator runs on ``device``.

    Args:
        impl: ``"auto"`` or a name. ``"auto"`` is Triton on a GPU that its kernels run on, else torch; that a GPU is too
            old is said in a warning, one a process.

    Raises:
        ValueError: Triton by name on a GPU too old for its kernels.
    """
    global _warned_of_old_gpu
    if impl not in (AUTO, "triton"):
        return impl
    capability = gpu_capability(device)
    if capability is None:
        return "torch" if impl == AUTO else impl
    if capability >= MIN_CAPABILITY:
        return "triton"
    rule = (
        f"the Triton kernels need a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or higher, "
        f"and {device} has {capability[0]}.{capability[1]}"
    )
    if impl == "triton":
        raise ValueError(f"impl='triton': {rule}; use impl='torch'")
    if not _warned_of_old_gpu:
        _warned_of_old_gpu = True
        warnings.warn(f"{rule}: the operators of psa_kernels run in plain torch, which is slower", stacklevel=2)
    return "torch"


def impl_for_dtype(impl: str, by_name: bool, name: str, x: Tensor) -> str:
    """``impl``, or torch where that is Triton in its interpreter and ``x`` is bfloat16, whose bit patterns the
    interpreter's ``tl.dot`` multiplies as integers.

    Args:
        impl: the implementation that is to run.
        by_name: whether the caller asked for it, and so must not get another.
        name: of the argument ``x``.

    Raises:
        TypeError: Triton was asked for by name.
    """
    if impl != "triton" or x.dtype != torch.bfloat16:
        return impl
    # Imported here because it imports Triton, which importing the package does without.
    from psa_kernels.triton_device import is_interpreted

    if not is_interpreted():
        return impl
    if by_name:
        raise TypeError(
            f"{name} must be float16 or float32 with impl='triton' in Triton's interpreter, which multiplies bfloat16 "
            f"wrongly, got {x.dtype}; or use impl='torch'"
        )
    return "torch"


def strided(name: str, x: Tensor) -> None:
    """``x`` is a tensor whose elements all lie in memory, not one of torch's sparse or nested layouts."""
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {x.layout}")


def floating(name: str, x: Tensor) -> None:
    """``x`` is a tensor of a floating-point dtype that torch computes with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    strided(name, x)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def sequence(name: str, x: Tensor) -> None:
    """``x`` is a floating-point ``[B, H, L, D]`` tensor with no empty dimension."""
    floating(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape [B, H, L, D], got {list(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} must have no empty dimension, got {list(x.shape)}")


def same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` lies on the device of ``other`` and has its dtype."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")


def query_and_key(query: Tensor, key: Tensor) -> None:
    """Shapes of ``query`` ``[B, H, q_len, D]`` and ``key`` ``[B, H_kv, kv_len, D]`` go together."""
    sequence("query", query)
    sequence("key", key)
    same("key", key, "query", query)
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have query's batch size {query.shape[0]}, got {key.shape[0]}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have query's head_dim {query.shape[3]}, got {key.shape[3]}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key's heads must divide query's (grouped-query attention), got {key.shape[1]} for {query.shape[1]}"
        )


def lengths(kv_lengths: Tensor | None, batch: int, device: torch.device) -> None:
    """``kv_lengths`` is None or an integer tensor ``[B]`` on ``device``; its values stay unread."""
    if kv_lengths is None:
        return
    if not isinstance(kv_lengths, Tensor):
        raise TypeError(f"kv_lengths must be an integer tensor [B], got {type(kv_lengths).__name__}")
    strided("kv_lengths", kv_lengths)
    if kv_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"kv_lengths must be int32 or int64, got {kv_lengths.dtype}")
    if tuple(kv_lengths.shape) != (batch,):
        raise ValueError(f"kv_lengths must have shape [{batch}], one length a sample, got {list(kv_lengths.shape)}")
    if kv_lengths.device != device:
        raise ValueError(f"kv_lengths must be on query's device {device}, got {kv_lengths.device}")


def has_values(x: Tensor) -> bool:
    """Whether the values of ``x`` may be looked at: they lie on the CPU, so that nobody waits for a GPU, and are there.

    What torch.compile or a FakeTensorMode traces has none, and torch.func.vmap does not show those of a sample.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not isinstance(x, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _wants_other_derivative(x: Tensor) -> bool:
    """Whether a derivative with respect to ``x`` is taken in forward mode or by torch.func, as far as can be seen."""
    if torch.compiler.is_compiling():
        return False
    # torch has no public name for what its transforms wrap a tensor in. A sample of torch.func.vmap tells nothing.
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        is_tracked = torch._C._functorch.is_gradtrackingtensor(x)
        if is_tracked and ((torch.is_grad_enabled() and x.requires_grad) or unpack_dual(x).tangent is not None):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return unpack_dual(x).tangent is not None


def backward_mode_alone(what: str, instead: str, *tensors: Tensor) -> None:
    """A derivative of the operator that only its backward pass has is refused where it is asked for otherwise: torch
    would take it for 0 in forward mode, in silence, and fail in torch.func with words about its own classes.

    Args:
        what: the operator.
        instead: what can, to end the message with.
    """
    if any(_wants_other_derivative(t) for t in tensors):
        raise NotImplementedError(  # nothing is left to write: torch's own type where an operator lacks a derivative
            f"{what} has derivatives by backward() and torch.autograd.grad alone, none in forward mode or by "
            f"torch.func's transforms{instead}"
        )


def no_grad_needed(what: str, *tensors: Tensor) -> None:
    """The operator has no backward pass, so a tensor that wants one is refused rather than cut off in silence."""
    wants_backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if wants_backward or any(_wants_other_derivative(t) for t in tensors):
        raise ValueError(
            f"{what} has no backward pass: call it under torch.no_grad(), or pass tensors that do not require grad"
        )


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def scale(value: float | None, head_dim: int) -> float:
    """``value`` as a finite float; None is ``1/sqrt(head_dim)``."""
    if value is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scale must be a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")
    return float(value)


def level_values(levels: Tensor, num_levels: int) -> None:
    """A map on the CPU lies in ``0..num_levels``; see :func:`has_values` for those that nobody looks at."""
    if not has_values(levels):
        return
    if not ((levels >= 0) & (levels <= num_levels)).all():
        raise ValueError(
            f"levels must lie in 0..num_levels = {num_levels}, "
            f"got values from {int(levels.min())} to {int(levels.max())}"
        )


def causal(is_causal: bool, q_len: int, kv_len: int) -> None:
    """Causal attention puts the last query at the last key, so there are at least as many keys as queries."""
    if is_causal and q_len > kv_len:
        raise ValueError(
            "is_causal aligns the last query with the last key, so q_len must not exceed kv_len, "
            f"got q_len {q_len} and kv_len {kv_len}"
        )
