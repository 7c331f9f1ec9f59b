"""How a script runs: its command line and its end, its device, alone or as one of torchrun's processes."""

import argparse
import datetime
import io
import os
import signal
import sys
import traceback

import torch
import torch.distributed as dist

from ..data.errors import InputError, input_errors

# Memory of sizes that vary from batch to batch is not kept in pieces that fit no other.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
PATIENCE = datetime.timedelta(hours=1)  # until a process that waits for the others gives up: as long as an evaluation
INTERRUPTED = 130  # the exit code of what was stopped
# Python's and PyTorch's words; those of CUDA, of a CPU, and of CUDA's libraries.
NO_MEMORY = ("MemoryError", "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "unable to find an engine")
SMALLER = "with a new --out, a smaller --batch or smaller --short-sides and --long-side, or --precision bf16"
LESS_MEMORY = f"out of memory: evaluate.py takes a smaller --batch, training a larger --accumulate, or, {SMALLER}"
MENDS = dict.fromkeys(NO_MEMORY, LESS_MEMORY) | {  # for the machine's limits; the first sign in an error's words counts
    "Too many open files": "too few files may be open at a time: raise the limit (ulimit -n), or try fewer --workers",
    "shared memory": "no room in /dev/shm for the workers: fewer --workers, or docker run --ipc=host",
    "DataLoader worker (pid": "a worker died: try fewer --workers",  # an error within one names no pid
    "DataLoader timed out": "a worker hangs: try fewer --workers",
    "more than 1 value per channel": "one image of one cell is too little for BatchNorm: a larger --batch",
}
CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")  # by gloo
MENDS |= dict.fromkeys(CUT_OFF, "another process of this run has ended, and says why")


class Parser(argparse.ArgumentParser):
    """An argument parser with one line a flag, and one line for what is wrong."""

    def __init__(self, description, usage="%(prog)s [flags]", **details):
        layout = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=56, width=140)
        super().__init__(description=description, usage=usage, allow_abbrev=False, formatter_class=layout, **details)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class Unfailing(io.FileIO):
    """A standard stream to which nothing fails: what nobody reads any more, or a full disk does not take, is lost."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def unfailing(stream):
    """The same standard stream, in which words are no reason to lose work: see `Unfailing`; and characters that it
    cannot show are escaped."""
    if not isinstance(stream, io.TextIOWrapper):  # closed from the start, or a notebook's
        return stream or open(os.devnull, "w")
    raw = Unfailing(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True)


def run_script(main):
    """Call a script's `main`, and turn what the user can mend into one line and exit code 2."""
    sys.stdout, sys.stderr = unfailing(sys.stdout), unfailing(sys.stderr)
    if hasattr(signal, "SIGHUP") and "RANK" not in os.environ:  # not on Windows: a terminal that closes ends no run
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # but torchrun's, which stops and saves
    try:
        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else explain(error)
        if not reason:
            raise
        # A worker process wraps an InputError in its traceback: the last line is ours.
        print(f"error: {reason.split('InputError: ')[-1].strip()}", file=sys.stderr)
        # The error and the frames it passed refer to one another, which would keep all workers alive.
        traceback.clear_frames(error.__traceback__)
        code = 2
    if dist.is_initialized() and code:
        # Others may wait for this process in a collective: it leaves at once, and torchrun ends them.
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def explain(error):
    """What to do about an error that comes from the machine's limits, or None for any other."""
    text = "" if isinstance(error, InputError) else f"{type(error).__name__}: {error}"  # an InputError says it itself
    return next((mend for sign, mend in MENDS.items() if sign in text), None)


def init_device(name):
    """Join torchrun's group if there is one (nccl on CUDA, gloo elsewhere) -> this process's device.

    `name` is "cuda", "cpu" or "": CUDA where there is one. Raises InputError for a device that is not there.
    On CUDA fp32 is fp32: convolutions do not round their input to TF32.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":  # where a cluster shows every process its own device only, that is number 0
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(1, torch.cuda.device_count())}"
    with input_errors(f"--device {name}", "cannot be used", errors=(RuntimeError, AssertionError)):
        device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives without a tensor of their own take place
        torch.backends.cudnn.allow_tf32 = False
    if "RANK" in os.environ and not dist.is_initialized():
        backend, own = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {})
        with input_errors("RANK is set", "but the other processes cannot be joined", errors=(RuntimeError, ValueError)):
            dist.init_process_group(backend, timeout=PATIENCE, **own)
    return device


def describe(device):
    """A device in words, with a card's name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def native_precision(device):
    """ "bf16" where the device computes in it rather than imitating it, else "fp32"."""
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def autocast(device, precision):
    """The context, to be entered as often as wanted, in which the network runs at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def training_layout(device, precision):
    """The memory layout in which a device trains fastest: channels_last, except in fp32 on CUDA, where TF32 is off, and
    on a processor without AVX-512, whose backward convolutions are faster in NCHW (NOTES, "Lessons learned")."""
    old_cpu = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    nchw = precision == "fp32" and (device.type == "cuda" or old_cpu)
    return torch.contiguous_format if nchw else torch.channels_last


def rank():
    """This process's number within torchrun's group; 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def print_once(line):
    """Print a line, by the main process alone."""
    if is_main():
        print(line, flush=True)


def parallel(model, device, settings):
    """A model, moved to its device, in training mode, and wrapped where gradients are averaged over processes.

    `settings.norm` says whose statistics BatchNorm uses in training: those of all processes ("sync"; on CUDA), of each
    process's own images ("local"), or those it starts with ("frozen": it is in eval mode).
    """
    norm, cuda = settings.norm, device.type == "cuda"
    model.to(device, memory_format=training_layout(device, settings.precision))
    model.train()
    for module in model.modules():
        if norm == "frozen" and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    if not dist.is_initialized():
        return model
    if norm == "sync" and cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # BatchNorm's running statistics are broadcast only where each process has its own. As an argument of the
    # constructor this is deprecated, and its successor is not in every version.
    network.broadcast_buffers = norm == "local" or norm == "sync" and not cuda
    return network


def mean_over_processes(value):
    """A tensor's mean over all processes; of several, without a gradient."""
    if not dist.is_initialized():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def share_buffers(model):
    """Give every process the main one's BatchNorm statistics, which a checkpoint holds."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


def gather(items):
    """A list from each process -> all items, in the order of the processes."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
