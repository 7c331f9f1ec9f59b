"""Settings of a training run: three recipes, and the flags that both training scripts have.

A value is what was typed, else what is inherited (a student's data, sizes and architecture are its teacher's), else the
script's own default, else the recipe's. A resumed run takes all of them from its checkpoint and refuses to be told
otherwise, except where things are, and in how many parts a batch is computed.
"""

import math
from argparse import SUPPRESS, Namespace
from dataclasses import fields

from ..backbone import LAYERS, WIDTHS
from ..data import shapes
from ..data.annotations import count_images
from ..data.errors import InputError, checkpoint_errors
from ..distillation import DISTANCES
from ..models import HEADS, ModelConfig
from . import processes

# Every setting of both training scripts, each a flag too, with its value in the three recipes: small (drawn pictures, a
# laptop), photos (one's own) and coco (the paper's). A value of None is computed from the number of photos. Sides are in
# pixels of the high-resolution input.
TABLE = {
    "where things are": {
        "data": ("", "", "", "folder in COCO layout (default: drawn shapes in data/shapes)"),
        "recipe": ("small", "photos", "coco", "defaults of all else (default: small without --data, else by its size)"),
        "out": ("", "", "", "folder for checkpoints and log (default: runs/ and what is trained)"),
    },
    "pictures (sides in pixels of the high-resolution input)": {
        "short_sides": ([256], list(range(512, 641, 32)), list(range(640, 801, 32)), "short sides in training"),
        "test_side": (256, 640, 800, "short side in evaluation"),
        "long_side": (512, 1066, 1333, "upper bound of the long side"),
        "pad": (64, 64, 64, "sides are padded to multiples of this"),
        "downsample": ("area", "area", "area", "how low resolution is made from high"),
    },
    "model": {
        "head": ("fcos", "fcos", "fcos", "detection head"),
        "backbone": ("resnet18", "resnet50", "resnet50", "resnet18, resnet34, resnet50 or resnet101"),
        "width": (0.25, 1.0, 1.0, "the backbone's width"),
        "weights": ("none", "imagenet", "imagenet", "start: imagenet, coco (a detector), none or a FILE"),
        "fpn_channels": (64, 256, 256, "channels of the pyramid"),
        "head_channels": (64, 256, 256, "channels of the head's towers"),
        "head_convs": (2, 4, 4, "convolutions in each tower"),
        "norm": ("sync", "frozen", "sync", "BatchNorm's statistics: of all processes, of each, or as at the start"),
        "object_scale": (0.68, 1.0, 1.0, "sizes of objects as a multiple of COCO's"),
    },
    "optimization": {
        "iters": (1200, None, 90_000, "training iterations"),
        "batch": (8, 8, 16, "images per iteration, over all processes"),
        "accumulate": (1, 1, 1, "parts in which a process computes its images of an iteration, one after the other"),
        "lr": (0.008, 2e-4, 0.01, "learning rate, in proportion to --batch"),
        "optimizer": ("adamw", "adamw", "sgd", "optimizer"),
        "weight_decay": (0.05, 0.05, 1e-4, "weight decay, none on normalisation layers"),
        "schedule": ("cosine", "cosine", "step", "learning rate after the warm-up"),
        "warmup": (200, 100, 500, "iterations of linear warm-up from lr/1000"),
        "clip": (5.0, 5.0, 0.0, "largest norm of the gradient (0: no limit)"),
    },
    "the run": {
        "seed": (0, 0, 0, "seed of everything random"),
        "device": ("", "", "", "cuda or cpu (default: CUDA where there is one)"),
        "precision": ("", "", "", "default: bf16 where the device has it"),
        "workers": (0, 2, 4, "processes that read images"),
        "eval_every": (600, None, 10_000, "iterations between evaluations"),
        "save_every": (250, 250, 500, "iterations between checkpoints"),
        "log_every": (20, 20, 20, "iterations between lines of the log"),
    },
}
ROWS = {name: row for group in TABLE.values() for name, row in group.items()}
SMALL, PHOTOS, COCO = ({name: row[recipe] for name, row in ROWS.items()} for recipe in (0, 1, 2))
RECIPES = {"small": SMALL, "photos": PHOTOS, "coco": COCO}
# RetinaNet's towers have no normalisation: with the small recipe it takes smaller steps, and more of them.
SMALL_RETINANET = {"iters": 2000, "lr": 0.003, "eval_every": 1000}
MANY = 20_000  # training photos, from which on the recipe is COCO's
EPOCHS, SHORTEST, LONGEST = 36, 1500, 30_000  # of the recipe for photos, the last two in iterations
CHOICES = {
    "res": ("multi", "high", "low"),
    "kd_loss": tuple(DISTANCES),
    "recipe": tuple(RECIPES),
    "downsample": ("area", "nearest"),
    "head": tuple(HEADS),
    "backbone": tuple(LAYERS),
    "width": WIDTHS,
    "norm": ("sync", "local", "frozen"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "cosine"),
    "precision": ("fp32", "bf16"),
}
# What may change on --resume: where things are, and what suits the machine.
MAY_CHANGE = ("data", "teacher", "device", "out", "workers", "save_every", "accumulate")
LEAST = dict.fromkeys(("seed", "workers", "warmup", "lr", "weight_decay", "clip", "kd", "kd_ramp", "width"), 0)
LEAST["object_scale"] = 0.01  # all other numbers: 1
ARCHITECTURE = [f.name for f in fields(ModelConfig) if f.name in COCO]


def parse_flags(description, own):
    """Make flags of the settings of both scripts and of a script's own, {name: (value, help)} -> a dict of only what
    was typed, and whether to resume."""
    parser = processes.Parser(description, argument_default=SUPPRESS)  # what is not typed leaves no trace
    for title, rows in {"what to train": own, **TABLE}.items():
        group = parser.add_argument_group(title)
        for name, (*values, text) in rows.items():
            if name in own and rows is not own:
                continue
            flag, choices, coco = f"--{name.replace('_', '-')}", CHOICES.get(name), values[-1]
            if isinstance(coco, bool):
                group.add_argument(flag, action="store_true", help=text)
                continue
            details = {"type": int, "nargs": "+"} if isinstance(coco, list) else {"type": type(coco)}
            if name == "backbone" or not choices:  # a list of all backbones would not fit its column
                details["metavar"] = "X" if isinstance(coco, str) else "N"
            if coco and name != "recipe":
                each = ", ".join(f"{recipe} {shown(value)}" for recipe, value in zip(RECIPES, values))
                text += f" [{shown(coco)}]" if values.count(coco) == len(values) else f" [{each}]"
            group.add_argument(flag, choices=choices, help=text, **details)
    group.add_argument("--resume", action="store_true", default=False, help="go on from OUT/last.pt")
    typed = vars(parser.parse_args())
    return typed, typed.pop("resume")


def shown(value):
    """A default as --help shows it."""
    if isinstance(value, list):
        return f"{value[0]}-{value[-1]}" if len(value) > 1 else value[0]
    return f"{value:g}" if isinstance(value, float) else "by their number" if value is None else value


def settle(typed, own, inherited=None):
    """The settings of a run. `own` are the script's rows, `inherited` the settings that a student takes over.

    The number of training photos, if there are any, chooses the recipe that nobody named, and the length of the one for
    photos. Raises InputError.
    """
    known = {name: row[0] for name, row in own.items()} | (inherited or {}) | typed
    name, data = known.get("recipe"), known.get("data")
    count = data and (not name or name == "photos" and "iters" not in typed)
    photos = count_images(data) if count else shapes.TRAIN
    if not name:
        name = "small" if not data else "photos" if photos < MANY else "coco"
        if data:
            processes.print_once(f"recipe    {name}, chosen for {photos} training photos; --recipe takes another")
    smaller_steps = name == "small" and known.get("head") == "retinanet"
    recipe = RECIPES[name] | (SMALL_RETINANET if smaller_steps else {})
    settings = Namespace(**recipe | known | {"recipe": name})
    if "batch" in typed and "lr" not in typed:
        settings.lr = recipe["lr"] * settings.batch / recipe["batch"]
    if settings.iters is None:
        settings.iters = min(max(SHORTEST, EPOCHS * photos // settings.batch), LONGEST)
    if settings.eval_every is None:
        settings.eval_every = max(1, settings.iters // 4)
    if name == "photos" and "kd_ramp" in own and "kd_ramp" not in typed:
        settings.kd_ramp = settings.iters // 20
    if name == "photos" and settings.weights == "none" and "norm" not in typed:
        settings.norm = "sync"  # there are no statistics yet that could stay
    check_settings(settings)
    return settings


def resume_settings(typed, own, content, path):
    """The settings that a checkpoint's run began with. What was typed must not contradict them."""
    if content["training"] is None:
        raise InputError(f"{path}: holds a model only, nothing to resume a run from")
    defaults = COCO | {name: row[0] for name, row in own.items()}
    with checkpoint_errors(path):
        stored = dict(content["training"]["settings"])
        if stored.keys() != defaults.keys():
            raise InputError(f"{path}: is another script's run; resume it with that one")
        for name, value in stored.items():
            check_stored(name, value, defaults[name])
    changed = [name for name in typed if name not in MAY_CHANGE and typed[name] != stored[name]]
    if {typed.get("weights"), stored["weights"]}.isdisjoint(("imagenet", "coco", "teacher", "none")):
        changed = [name for name in changed if name != "weights"]  # a file, of which only the start had need
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')} {typed[name]} (was {stored[name]})" for name in changed)
        raise InputError(f"{path}: was trained with other settings: {flags}; leave them out, or start a new --out")
    settings = Namespace(**stored | typed)
    check_settings(settings)
    return settings


def check_stored(name, value, default):
    """Raise ValueError for a value that a setting never has."""
    strange = type(value) is not type(default) or isinstance(value, list) and any(type(v) is not int for v in value)
    if strange or name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name} is {value!r}")


def check_settings(settings):
    """Raise InputError for values that no run can be made of."""
    for name, value in vars(settings).items():
        numbers = value if isinstance(value, list) else [value] if type(value) in (int, float) else []
        least = LEAST.get(name, 1)
        if not all(least <= number < math.inf for number in numbers):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}, and finite")
    multiple = HEADS[settings.head].channel_multiple
    if settings.head_channels % multiple:
        raise InputError(f"--head-channels must be a multiple of {multiple} for {settings.head}")
    if settings.pad % 64:
        raise InputError("--pad must be a multiple of 64, or the two pyramids do not align")


def model_config(settings, kind, classes):
    """The ModelConfig that a run's settings describe."""
    values = {name: getattr(settings, name) for name in ARCHITECTURE}
    return ModelConfig(kind, classes, short_side=settings.test_side, **values)


def inherit(teacher, path):
    """The settings that a student takes from its teacher's checkpoint: architecture and sizes, data and recipe."""
    config, training = teacher["config"], teacher["training"] or {}
    inherited = {"test_side": config.short_side} | {name: getattr(config, name) for name in ARCHITECTURE}
    with checkpoint_errors(path):
        stored = training.get("settings", {})
        for name in ("data", "recipe", "short_sides"):
            if name in stored:
                # Early teachers have a tuple of sides.
                value = list(stored[name]) if isinstance(stored[name], tuple) else stored[name]
                check_stored(name, value, COCO[name])
                inherited[name] = value
    return inherited
