"""One process or many: the few questions the rest of the code asks. Started by torchrun, or alone."""

import os

import torch
import torch.distributed as dist

from .annotations import InputError


def start(device):
    """Join torchrun's group if there is one (nccl on CUDA, gloo elsewhere)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives without a tensor of their own take place
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, known before it has joined torchrun's group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def count():
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def parallel(model):
    """The model wrapped so that gradients are averaged over processes; alone, the model itself."""
    if not dist.is_initialized():
        return model
    if next(model.parameters()).is_cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(model)


def mean_over_processes(value):
    """A scalar tensor's mean over all processes; of several, without a gradient."""
    if not dist.is_initialized():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def gather(items):
    """A list from each process -> all items, in the order of the processes."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def device_of(name):
    """The device for `name` ("cuda", "cpu", or "": CUDA where there is one); with torchrun, this process's own."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not there ({str(error).splitlines()[0]})") from None
