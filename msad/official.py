"""Weights from elsewhere: torchvision's ImageNet backbones."""

import torchvision

from .annotations import InputError
from .checkpoint import read_tensors


def load_backbone(backbone, settings):
    """Fill a ResNet from `settings.weights`: "imagenet" (downloaded by torchvision), a file of such weights, or "none"."""
    if settings.weights == "none":
        return
    if settings.weights == "imagenet":
        try:
            weights = torchvision.models.get_model(settings.backbone, weights="IMAGENET1K_V1").state_dict()
        except OSError as error:
            raise InputError(
                f"the ImageNet weights of {settings.backbone} cannot be downloaded ({error}); "
                "give a file (--weights FILE) or start from nothing (--weights none)"
            ) from None
    else:
        weights = read_tensors(settings.weights)
    try:
        backbone.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--weights {settings.weights}: not for {settings.backbone} of width {settings.width:g}: {reason}") from None
