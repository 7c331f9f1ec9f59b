"""Settings of a training run: the recipe for COCO, what three others change in it, and the flags of both scripts.

A value is what was typed, else what is inherited (a student's data, sizes and architecture are its teacher's), else the
script's own default, else the recipe's. A resumed run takes all of them from its checkpoint.
"""

from argparse import SUPPRESS, Namespace
from dataclasses import fields
from typing import NamedTuple

from .. import align
from ..backbone import LAYERS, WIDTHS
from ..data.errors import InputError, checkpoint_errors
from ..models import HEADS, ModelConfig
from . import processes


class Setting(NamedTuple):
    """A setting, and the flag of the same name."""

    default: object  # its type is the flag's; a list stands for several integers
    help: str
    choices: tuple = ()
    least: float = 1  # of numbers


# The recipes: what each changes in COCO's. small draws shapes and needs no GPU, laptop trains on photos without a GPU,
# photos on one GPU. BASE is common to all three, NO_GPU to the first two.
BASE = {"optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "clip": 5.0, "save_every": 250}
NO_GPU = BASE | {"backbone": "resnet18", "fpn_channels": 64, "head_channels": 64, "head_convs": 2, "workers": 0}
SMALL = NO_GPU | {
    "short_sides": [256], "test_side": 256, "long_side": 512, "width": 0.25, "weights": "none", "object_scale": 0.68,
    "iters": 1200, "batch": 8, "lr": 0.008, "weight_decay": 0.5, "warmup": 200, "eval_every": 600,
}  # fmt: skip
LAPTOP = NO_GPU | {
    "short_sides": [224, 240, 256, 272, 288], "test_side": 256, "long_side": 448,
    "batch": 4, "lr": 4e-4, "norm": "frozen",
}  # fmt: skip
PHOTOS = BASE | {
    "short_sides": list(range(512, 641, 32)), "test_side": 640, "long_side": 1066,
    "batch": 8, "lr": 2e-4, "norm": "frozen", "workers": 2,
}  # fmt: skip
RECIPES = {"small": SMALL, "laptop": LAPTOP, "photos": PHOTOS, "coco": {}}
# RetinaNet's towers have no normalisation: with the small recipe it takes smaller steps, and more of them.
SMALL_RETINANET = {"iters": 2000, "lr": 0.003, "weight_decay": 0.05, "eval_every": 1000}
# The settings of both training scripts, with their values in the recipe for COCO, the paper's.
SETTINGS = {
    "where things are": {
        "data": Setting("", "folder in COCO layout (default: drawn shapes in data/shapes)"),
        "recipe": Setting("", "defaults of all else (default: by data and device)", tuple(RECIPES)),
        "out": Setting("", "folder for checkpoints and log (default: runs/ and what is trained)"),
    },
    "pictures (sides in pixels of the high-resolution input)": {
        "short_sides": Setting(list(range(640, 801, 32)), "short sides in training"),
        "test_side": Setting(800, "short side in evaluation"),
        "long_side": Setting(1333, "upper bound of the long side"),
        "pad": Setting(64, "sides are padded to multiples of this"),
        "downsample": Setting("area", "how low resolution is made from high", ("area", "nearest")),
    },
    "model": {
        "head": Setting("fcos", "detection head", tuple(HEADS)),
        "backbone": Setting("resnet50", "backbone", tuple(LAYERS)),
        "width": Setting(1.0, "the backbone's width", WIDTHS),
        "weights": Setting("imagenet", "start: imagenet, coco (a detector), none or a FILE"),
        "fpn_channels": Setting(256, "channels of the pyramid"),
        "head_channels": Setting(256, "channels of the head's towers"),
        "head_convs": Setting(4, "convolutions in each tower"),
        "norm": Setting("sync", "whose statistics BatchNorm uses (frozen: the start's)", ("sync", "local", "frozen")),
        "object_scale": Setting(1.0, "sizes of objects as a multiple of COCO's", least=0.01),
    },
    "optimization": {
        "iters": Setting(90_000, "training iterations (laptop, photos: by the number of pictures with boxes)"),
        "batch": Setting(16, "images per iteration, over all processes"),
        "accumulate": Setting(1, "parts in which a process computes its images of an iteration, one after the other"),
        "lr": Setting(0.01, "learning rate (default: in proportion to --batch)", least=0),
        "optimizer": Setting("sgd", "optimizer", ("sgd", "adamw")),
        "weight_decay": Setting(1e-4, "weight decay, none on normalisation layers", least=0),
        "schedule": Setting("step", "learning rate after the warm-up", ("step", "cosine")),
        "warmup": Setting(500, "iterations of linear warm-up from lr/1000", least=0),
        "clip": Setting(0.0, "largest norm of the gradient (0: no limit)", least=0),
    },
    "the run": {
        "seed": Setting(0, "seed of everything random", least=0),
        "device": Setting("", "cuda or cpu (default: CUDA where there is one)"),
        "precision": Setting("", "default: bf16 where the device has it", ("fp32", "bf16")),
        "workers": Setting(4, "processes that read images", least=0),
        "eval_every": Setting(10_000, "iterations between evaluations (laptop, photos: a quarter of them)"),
        "save_every": Setting(500, "iterations between checkpoints"),
        "log_every": Setting(20, "iterations between lines of the log"),
    },
}
COCO = {name: setting.default for group in SETTINGS.values() for name, setting in group.items()}

# Where the length follows from the pictures that have boxes: epochs of them, and bounds in iterations.
LENGTHS = {"laptop": (6, 3000, 20_000), "photos": (36, 3000, 30_000)}
MANY = 20_000  # training photos, from which on a GPU takes COCO's recipe

# What may change on --resume: where things are, and what suits the machine.
MAY_CHANGE = ("data", "teacher", "device", "out", "workers", "save_every", "accumulate")
ARCHITECTURE = [f.name for f in fields(ModelConfig) if f.name in COCO]


def flag(name):
    return f"--{name.replace('_', '-')}"


def parse_flags(description, own):
    """Make flags of the settings of both scripts and of a script's own -> a dict of what was typed, and whether to
    resume."""
    parser = processes.Parser(description, argument_default=SUPPRESS)  # what is not typed leaves no trace
    shared = {title: {n: s for n, s in rows.items() if n not in own} for title, rows in SETTINGS.items()}
    groups = {"what to train": own, **shared}
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for name, setting in rows.items():
            if isinstance(setting.default, bool):
                group.add_argument(flag(name), action="store_true", help=setting.help)
                continue
            kind, choices = type(setting.default), setting.choices or None
            shown = None if choices else "X" if kind is str else "N"
            details = {"type": int, "nargs": "+"} if kind is list else {"type": kind}
            text = setting.help + defaults_text(name, setting, {} if rows is own else RECIPES)
            group.add_argument(flag(name), choices=choices, metavar=shown, help=text, **details)
    group.add_argument("--resume", action="store_true", default=False, help="go on from OUT/last.pt")
    typed = vars(parser.parse_args())
    for name, setting in (row for rows in groups.values() for row in rows.items()):
        value = typed.get(name, [])
        numbers = [v for v in (value if isinstance(value, list) else [value]) if type(v) in (int, float)]
        if not setting.choices and not all(setting.least <= number < 2**63 for number in numbers):
            parser.error(f"{flag(name)} {value}: must be at least {setting.least}, and below 2^63")
    return typed, typed.pop("resume")


def defaults_text(name, setting, recipes):
    """A setting's default, and what recipes have instead, as --help shows it."""
    shown = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    others = [f"{title} {shown(recipe[name])}" for title, recipe in recipes.items() if name in recipe]
    return "" if setting.default == "" else f" [{'; '.join([shown(setting.default), *others])}]"


def choose_recipe(data, photos, device):
    """The recipe where none is named: by the data's folder, "" for drawn shapes, the number of pictures that have
    boxes, and the device. Prints a line that says why."""
    if not data:
        return "small"
    name = "laptop" if device.type != "cuda" else "photos" if photos < MANY else "coco"
    why = " and no GPU; with one, --recipe photos is better" if name == "laptop" else "; --recipe takes another"
    processes.print_once(f"recipe    {name}, chosen for {photos} training photos with boxes{why}")
    return name


def settle(known, own, photos, device):
    """All settings of a run. `known` is what was typed, inherited or stored, `own` the script's own settings, `photos`
    the number of training pictures that have boxes. Raises InputError."""
    name = known.get("recipe") or choose_recipe(known.get("data"), photos, device)
    smaller_steps = name == "small" and known.get("head") == "retinanet"
    recipe = COCO | RECIPES[name] | (SMALL_RETINANET if smaller_steps else {})
    defaults = recipe | {name: setting.default for name, setting in own.items()}
    settings = Namespace(**defaults | known | {"recipe": name})
    if "lr" not in known:
        settings.lr = recipe["lr"] * settings.batch / recipe["batch"]
    if name in LENGTHS:
        epochs, shortest, longest = LENGTHS[name]
        settings.iters = known.get("iters", min(max(shortest, epochs * photos // settings.batch), longest))
        settings.eval_every = known.get("eval_every", -(-settings.iters // 4))  # four, not five
        if "kd_ramp" in own:
            settings.kd_ramp = known.get("kd_ramp", settings.iters // 20)
    if settings.weights == "none" and "norm" not in known:
        settings.norm = "sync"  # there are no statistics yet that could stay
    settings.precision = settings.precision or processes.native_precision(device)
    check_settings(settings)
    return settings


def check_settings(settings):
    """Raise InputError for values that do not go together."""
    count, parts = processes.world_size(), settings.accumulate
    if settings.batch < count:
        raise InputError(f"--batch {settings.batch} is smaller than the number of processes, {count}")
    if parts > 1 and settings.batch % (parts * count):
        raise InputError(f"--accumulate {parts}: must divide --batch {settings.batch} over {count} process(es)")
    multiple = HEADS[settings.head].channel_multiple
    if settings.head_channels % multiple:
        raise InputError(f"--head-channels must be a multiple of {multiple} for {settings.head}")
    if settings.pad % align.MULTIPLE:
        raise InputError(f"--pad must be a multiple of {align.MULTIPLE}, or the two pyramids do not align")


def resume_settings(typed, own, content, path):
    """The settings of a checkpoint's run, a dict, with what was typed, which must not contradict them."""
    if content["training"] is None:
        raise InputError(f"{path}: holds a model only, nothing to resume a run from")
    with checkpoint_errors(path):
        stored = dict(content["training"]["settings"])
    if stored.keys() != COCO.keys() | own.keys():
        raise InputError(f"{path}: is another script's run; resume it with that one")
    changed = [name for name in typed if name not in MAY_CHANGE and typed[name] != stored[name]]
    if changed:
        flags = ", ".join(f"{flag(name)} {typed[name]} (was {stored[name]})" for name in changed)
        mend = f"leave them out, or start from its weights: --weights {path} and a new --out"
        raise InputError(f"{path}: was trained with other settings: {flags}; {mend}")
    return stored | typed


def model_config(settings, kind, classes):
    """The ModelConfig that a run's settings describe."""
    values = {name: getattr(settings, name) for name in ARCHITECTURE}
    return ModelConfig(kind, classes, short_side=settings.test_side, **values)


def inherit(teacher, path):
    """The settings that a student takes from its teacher's checkpoint: architecture and sizes, data and recipe."""
    config = teacher["config"]
    inherited = {"test_side": config.short_side} | {name: getattr(config, name) for name in ARCHITECTURE}
    with checkpoint_errors(path):
        stored = (teacher["training"] or {"settings": {}})["settings"]
        return inherited | {name: stored[name] for name in ("data", "recipe", "short_sides") if name in stored}
