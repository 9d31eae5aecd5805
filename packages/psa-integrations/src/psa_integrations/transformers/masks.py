"""What transformers tells an attention function about padding and caches, kept small enough for long prompts.

A boolean mask of every query and key of a long prompt does not fit the memory. For plain causal attention over padded
samples, or over a cache, one number a key says as much: its role. Roles are a tensor, as models pass masks through
their layers unread, of four dimensions, as transformers takes those for finished masks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EXISTS, OF_A_QUERY = 1, 2
"""Bits of a role: the key is neither padding nor unfilled cache; it stands where one of the queries does."""


def mask_maker(min_queries: int) -> Callable[..., Tensor | None]:
    """A mask function for transformers' AttentionMaskInterface.

    For calls with fewer than `min_queries` queries, and for masks that are not plainly causal, it makes what
    `sdpa_mask` makes. For others it returns None where all keys up to the last query exist and none precedes the first
    query, and key roles elsewhere.
    """

    def pyramid_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor | None:
        from transformers.masking_utils import causal_mask_function, sdpa_mask

        mask_function = causal_mask_function if mask_function is None else mask_function
        if q_length < min_queries or mask_function is not causal_mask_function or kv_offset != 0:
            made: Tensor | None = sdpa_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                **options,
            )
            return made
        return key_roles(batch_size, q_length, kv_length, int(q_offset), attention_mask)

    return pyramid_mask


def key_roles(
    batch_size: int, q_length: int, kv_length: int, q_offset: int, attention_mask: Tensor | None
) -> Tensor | None:
    """The roles of the keys of a causal call, None where they go without saying.

    Args:
        q_offset: keys before the first query.
        attention_mask: bool or integer `[batch_size, keys]`, 0 where a key is padding; keys past its end are too.

    Returns:
        int8 `[batch_size, 1, 1, kv_length]` on the CPU, where layers read it without waiting for a device.
    """
    position = torch.arange(kv_length)
    exists = (position < q_offset + q_length).expand(batch_size, -1)
    if attention_mask is not None:
        given = attention_mask[:, :kv_length].to("cpu", torch.bool)
        exists = exists & torch.nn.functional.pad(given, (0, kv_length - given.shape[1]))
    if q_offset == 0 and bool(exists[:, :q_length].all()):
        return None
    of_a_query = (position >= q_offset) & (position < q_offset + q_length)
    return (exists * EXISTS + of_a_query * OF_A_QUERY).to(torch.int8)[:, None, None, :]


def is_roles(mask: object) -> bool:
    """Whether a layer's attention mask is `key_roles`."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int8


def dense_mask(roles: Tensor, q_length: int, device: torch.device) -> Tensor:
    """bool `[B, 1, q_length, kv_length]`, True where a query sees a key: what `sdpa_mask` makes of the same call."""
    position = torch.arange(roles.shape[-1], device=device)
    roles = roles.to(device)
    first = (roles >= OF_A_QUERY).to(torch.int8).argmax(dim=-1, keepdim=True)  # [B, 1, 1, 1]
    query = first + torch.arange(q_length, device=device)[:, None]
    return (roles & EXISTS).bool() & (position <= query)


def existing(roles: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each sample the queries and the keys that exist, int64 indices into its queries and its keys.

    Without what does not exist, the last query stands at the last key again.
    """
    found = []
    for sample in roles.cpu().flatten(1):
        of_a_query = (sample >= OF_A_QUERY).nonzero().flatten()
        queries = (sample[of_a_query] & EXISTS).nonzero().flatten()
        found.append((queries, (sample & EXISTS).nonzero().flatten()))
    return found
