"""How a script runs: its command line and its end, its device, alone or as one of torchrun's processes."""

import argparse
import os
import sys

import torch
import torch.distributed as dist

from .files import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser with one line a flag, and one line for what is wrong. What is not typed leaves no trace."""

    def __init__(self, description, usage="%(prog)s [flags]"):
        layout = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=48, width=140)
        details = {"allow_abbrev": False, "formatter_class": layout, "argument_default": argparse.SUPPRESS}
        super().__init__(description=description, usage=usage, **details)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run_script(main):
    """Call a script's `main`, and turn what the user can mend into one line and exit code 2."""
    try:
        code = main()
    except InputError as error:
        # A worker process wraps the message in its traceback; the last line is ours.
        print(f"error: {str(error).split('InputError: ')[-1].strip()}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print("error: a process that reads images died; go on with --resume and fewer --workers", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def start(name):
    """Join torchrun's group if there is one (nccl on CUDA, gloo elsewhere) -> this process's device.

    `name` is "cuda", "cpu" or "": CUDA where there is one. Raises InputError for a device that is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not there ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives without a tensor of their own take place
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def native_precision(device):
    """ "bf16" where the device computes in it rather than imitating it, else "fp32"."""
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def autocast(device, precision):
    """The context, to be entered as often as wanted, in which the network runs at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def rank():
    """This process's number, known before it has joined torchrun's group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
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
    """A tensor's mean over all processes; of several, without a gradient."""
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
