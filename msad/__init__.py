"""msad"""

from .checkpoint import load
from .detector import Detector, ModelConfig
from .teacher import MultiScale, Teacher
