"""Share a frozen model's weights out over all processes (FSDP2), for a teacher that does not fit on one device."""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh


# A block that holds less of the model is gathered together with what is around it.
_SMALLEST_BLOCK = 0.01


def shard(model: nn.Module, device: torch.device) -> None:
    """
    Share a frozen model's parameters out, in place; each block's are gathered while that block runs.

    Blocks are what stands in a `ModuleList` or a `Sequential` and holds a hundredth of the model or more. Buffers, and
    parameters without a dimension, are on every process.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise ValueError(
            "Expected several processes with teacher_sharding='fsdp', got one, which would hold the whole teacher: "
            "run `accelerate launch --num_processes N script.py`, or leave teacher_sharding out."
        )
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for module in (*_blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, **({"ignored_params": scalars} if scalars else {}))
    model.to(device)  # the scalars


def let_go(model: nn.Module) -> None:
    """Let a sharded model go of what it has gathered, wherever its forward pass was left."""
    from torch.distributed.fsdp import FSDPModule

    if hasattr(model, "reset_iter_state"):  # of newer torch; also forgets what only a backward pass would read
        model.reset_iter_state()
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks to shard, inner ones first; weights that several share stay with the whole model."""
    total = sum(parameter.numel() for parameter in model.parameters())
    users = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[parameter].add(name)
    blocks = {}
    for path, module in model.named_modules():
        for name, block in module.named_children() if isinstance(module, (nn.ModuleList, nn.Sequential)) else ():
            prefix = f"{path}.{name}." if path else f"{name}."
            parameters = list(block.parameters())
            is_own = all(user.startswith(prefix) for p in parameters for user in users[p])
            is_large = sum(p.numel() for p in parameters) >= _SMALLEST_BLOCK * total
            if is_own and is_large and type(block).forward is not nn.Module.forward:  # a ModuleList has none
                blocks[block] = None
    return list(reversed(blocks))
