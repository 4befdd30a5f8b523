"""Which rows Marlin's blocks multiply with which expert, and the sum of a token's experts, by vLLM's operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte_cuda_marlin.vllm.calls import call
from halfbyte_cuda_marlin.vllm.shapes import MAX_EXPERTS

#: Rows of a block that Marlin has kernels for.
_BLOCKS: Final = (8, 16, 32, 48, 64)
#: A block is large enough where an expert's rows fill less than this part of it in the mean.
_FILLED: Final = 0.9
_ALIGN: Final = (
    *("topk_ids", "num_experts", "block_size", "sorted_token_ids", "experts_ids", "num_tokens_post_pad"),
    "maybe_expert_map",
)


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Slots (token x k + place) sorted by expert, each expert's filled up to whole blocks; int32, on the device."""

    block: int
    slots: Tensor
    #: The (local) expert of each block.
    experts: Tensor
    #: How many of `slots` there are.
    count: Tensor


class Router:
    """Sorts and sums."""

    def __init__(self) -> None:
        self._align = call("_moe_C::moe_align_block_size", _ALIGN, {})
        self._sum = call("_moe_C::moe_sum", ("input", "output", "topk_ids", "expert_map"), {})

    def route(self, topk_ids: Tensor, experts: int, expert_map: Tensor | None) -> Routing:
        """Sort the slots; those of other ranks' experts are left out. UsageError for too many experts."""
        number, total = topk_ids.numel(), experts if expert_map is None else expert_map.shape[0]
        if total > MAX_EXPERTS:
            raise UsageError(f"expert_map has {total} experts; vLLM's Marlin takes {MAX_EXPERTS} at most")
        block = block_size(number, total)
        size = min(number + total * (block - 1), number * block)
        device = topk_ids.device
        slots = torch.empty(size, dtype=torch.int32, device=device)
        of_blocks = torch.empty(-(-size // block), dtype=torch.int32, device=device)
        count = torch.empty(1, dtype=torch.int32, device=device)
        self._align(topk_ids, total, block, slots, of_blocks, count, expert_map)
        return Routing(block, slots, of_blocks, count)

    def sum(self, values: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
        """Return [T, H] for values [T x k, H]; those of other ranks' experts are not looked at."""
        tokens, top_k = topk_ids.shape
        stacked = values.view(tokens, top_k, -1)
        if expert_map is None:
            return stacked.sum(dim=1)
        result = values.new_empty(tokens, values.shape[1])
        self._sum(stacked, result, topk_ids, expert_map)
        return result


def block_size(slots: int, experts: int) -> int:
    """Rows of a block for so many slots spread over so many experts."""
    return next((block for block in _BLOCKS if slots / experts < _FILLED * block), _BLOCKS[-1])
