"""Settings of a run: two recipes, instances of one dataclass, whose fields are the flags of the scripts.

A value is what was typed, else what the script knows better (a student's architecture is its teacher's), else the
recipe's. A resumed run takes all of them from its checkpoint and refuses to be told otherwise.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

from . import checkpoint, processes
from .annotations import InputError
from .detector import HEADS, ModelConfig
from .resnet import LAYERS, WIDTHS
from .tensors import blamed

MAY_CHANGE = ("data", "device", "out", "workers", "save_every")  # on --resume: where a run is, not what it is
AT_LEAST = dict.fromkeys(("seed", "workers", "warmup", "lr", "weight_decay", "clip", "kd", "kd_ramp"), 0)
AT_LEAST["object_scale"] = 0.01  # all other numbers: 1


def option(default, text, choices=None):
    """A field of a settings dataclass that is also a flag on the command line."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. The defaults are the paper's on COCO; SMALL is for a laptop."""

    # Where things are
    data: str = option("", "folder in COCO layout (default: drawn shapes in data/shapes)")
    recipe: str = option("coco", "defaults of all else (default: small without --data, else coco)", ("small", "coco"))
    out: str = option("", "folder for checkpoints and log (default: runs/ and what is trained)")
    # Pictures: sides in pixels of the high-resolution input
    short_sides: tuple = option(tuple(range(640, 801, 32)), "short sides drawn from in training")
    test_side: int = option(800, "short side in evaluation")
    long_side: int = option(1333, "upper bound of the long side")
    pad: int = option(64, "sides are padded to multiples of this")
    downsample: str = option("area", "how low resolution is made from high", ("area", "nearest"))
    # Model
    head: str = option("fcos", "detection head", tuple(HEADS))
    backbone: str = option("resnet50", "resnet18, resnet34, resnet50 or resnet101", tuple(LAYERS))
    width: float = option(1.0, "the backbone's width", WIDTHS)
    weights: str = option("imagenet", "where the backbone starts: imagenet, none or a FILE [small none, coco imagenet]")
    fpn_channels: int = option(256, "channels of the pyramid")
    head_channels: int = option(256, "channels of the head's towers")
    head_convs: int = option(4, "convolutions in each tower")
    object_scale: float = option(1.0, "sizes of objects as a multiple of COCO's")
    # Optimization
    iters: int = option(90_000, "training iterations")
    batch: int = option(16, "images per iteration, over all processes")
    lr: float = option(0.01, "learning rate (default: in proportion to --batch)")
    optimizer: str = option("sgd", "optimizer", ("sgd", "adamw"))
    weight_decay: float = option(1e-4, "weight decay, none on normalisation layers")
    schedule: str = option("step", "learning rate after the warm-up", ("step", "cosine"))
    warmup: int = option(500, "iterations of linear warm-up from lr/1000")
    clip: float = option(0.0, "largest norm of the gradient (0: no limit)")
    # The run
    seed: int = option(0, "seed of everything random")
    device: str = option("", "cuda or cpu (default: CUDA where there is one)")
    precision: str = option("", "default: bf16 where the device has it", ("fp32", "bf16"))
    workers: int = option(4, "processes that read images")
    eval_every: int = option(10_000, "iterations between evaluations")
    save_every: int = option(500, "iterations between checkpoints")
    log_every: int = option(20, "iterations between lines of the log")


COCO = Recipe()
SMALL = Recipe(
    recipe="small",
    short_sides=(256,),
    test_side=256,
    long_side=512,
    backbone="resnet18",
    width=0.25,
    weights="none",
    fpn_channels=64,
    head_channels=64,
    head_convs=2,
    object_scale=0.68,
    iters=2000,
    batch=8,
    lr=0.003,
    optimizer="adamw",
    weight_decay=0.05,
    schedule="cosine",
    warmup=50,
    clip=5.0,
    workers=0,
    eval_every=1000,
    save_every=250,
)
RECIPES = {"small": SMALL, "coco": COCO}


# One line per flag.
Help = partial(argparse.RawDescriptionHelpFormatter, max_help_position=48, width=140)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


# Where each group of flags begins in --help.
GROUPS = {
    "data": "where things are",
    "short_sides": "pictures (sides in pixels of the high-resolution input)",
    "head": "model",
    "iters": "optimization",
    "seed": "the run",
}


def parse(kind, description):
    """The command line: a dict of only what was typed, and whether to resume. `kind` is a script's dataclass."""
    details = {"usage": "%(prog)s [flags]", "allow_abbrev": False, "formatter_class": Help, "add_help": False}
    parser = Parser(description=description, **details)
    own = {f.name for f in fields(kind)} - {f.name for f in fields(Recipe)}
    group = parser.add_argument_group("what to train")
    for f in sorted(fields(kind), key=lambda f: f.name not in own):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        add_flag(group, f)
    group.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    given = vars(parser.parse_args())
    if "short_sides" in given:
        given["short_sides"] = tuple(given["short_sides"])
    go_on = given.pop("resume")
    return given, go_on


def add_flag(group, f):
    """Add the flag of a dataclass's field; what was not typed leaves no trace."""
    name = "--" + f.name.replace("_", "-")
    if f.type is bool:
        group.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=f.metadata["help"])
        return
    details = {"type": f.type, "default": argparse.SUPPRESS, "help": f.metadata["help"] + default_text(f)}
    if f.type is tuple:
        details |= {"type": int, "nargs": "+"}
    if f.metadata["choices"]:
        details["choices"] = f.metadata["choices"]
    if f.name == "backbone" or not f.metadata["choices"]:  # a list of all backbones would not fit its column
        details["metavar"] = "X" if f.type is str else "N"
    group.add_argument(name, **details)


def default_text(f):
    """" [small, coco]" defaults where the recipes differ, " [default]" elsewhere."""
    shown = [getattr(recipe, f.name, f.default) for recipe in (SMALL, COCO)]
    if f.name in ("recipe", "weights") or "" in shown:
        return ""
    shown = ["-".join(map(str, sorted({min(v), max(v)}))) if isinstance(v, tuple) else v for v in shown]
    shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in shown]
    return f" [{shown[0]}]" if shown[0] == shown[1] else f" [small {shown[0]}, coco {shown[1]}]"


def settle(kind, given, defaults=None):
    """The settings of a run: what was typed, else `defaults`, else the recipe."""
    recipe = RECIPES[given.get("recipe") or ("coco" if given.get("data") else "small")]
    settings = kind(**asdict(recipe) | (defaults or {}) | given)
    if "batch" in given and "lr" not in given:
        settings = replace(settings, lr=recipe.lr * settings.batch / recipe.batch)
    return settings


def resume(kind, given, path):
    """A checkpoint and the settings it was trained with. What was typed must not contradict them."""
    content = checkpoint.read(path)
    if content.get("training") is None:
        raise InputError(f"{path}: holds a model only, nothing to resume a run from")
    with blamed(path):
        stored = dict(content["training"]["settings"])
        for f in fields(kind):
            check_kind(f, stored.get(f.name, f.default))
    changed = [k for k in given if k not in MAY_CHANGE and given[k] != stored.get(k)]
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} {given[k]} (was {stored.get(k)})" for k in changed)
        raise InputError(f"{path}: was trained with other settings: {flags}; leave them out, or start a new --out")
    try:
        return content, kind(**stored | {k: v for k, v in given.items() if k in MAY_CHANGE})
    except TypeError:
        raise InputError(f"{path}: is another script's run; resume it with that one") from None


def check_kind(f, value):
    """Raise TypeError or ValueError for a value that a field of the settings never has."""
    if type(value) is not f.type or f.type is tuple and any(type(v) is not int for v in value):
        raise TypeError(f"{f.name} is {value!r}")
    if f.metadata["choices"] and value not in (*f.metadata["choices"], f.default):
        raise ValueError(f"{f.name} is {value!r}")


def check_settings(settings):
    """Raise InputError for values that no run can be made of."""
    for f in fields(settings):
        value, least = getattr(settings, f.name), AT_LEAST.get(f.name, 1)
        numbers = value if f.type is tuple else (value,) if f.type in (int, float) and not f.metadata["choices"] else ()
        if not all(least <= v < math.inf for v in numbers):
            raise InputError(f"--{f.name.replace('_', '-')} {value}: must be at least {least}, and finite")
    multiple = HEADS[settings.head].channel_multiple
    if settings.head_channels % multiple:
        raise InputError(f"--head-channels must be a multiple of {multiple} for {settings.head}")
    if settings.pad % 64:
        raise InputError("--pad must be a multiple of 64, or the two pyramids do not align")
    if settings.batch < processes.count():
        raise InputError(f"--batch {settings.batch} is smaller than the number of processes, {processes.count()}")


ARCHITECTURE = [f.name for f in fields(ModelConfig) if hasattr(Recipe, f.name)]


def model_config(settings, kind, classes):
    """The ModelConfig that a run's settings describe."""
    values = {name: getattr(settings, name) for name in ARCHITECTURE}
    return ModelConfig(kind, classes, short_side=settings.test_side, **values)


def architecture(config):
    """The settings that describe a ModelConfig: `model_config` the other way round."""
    return {"test_side": config.short_side} | {name: getattr(config, name) for name in ARCHITECTURE}
