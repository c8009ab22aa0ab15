"""MotionClone in plain PyTorch: the motion of a reference video, in a new video of a prompt."""
from .checkpoint import load_model, save_model
from .config import ModelConfig, SampleConfig
from .errors import InputError, NumericalError
from .inversion import Inversion, invert_motion
from .model import Model
from .motion import Motion, extract_motion, motion_loss
from .sampler import State, sample
from .sparsectrl import sparse_condition
from .video import read_picture, read_video, write_video

__all__ = ["InputError", "Inversion", "Model", "ModelConfig", "Motion", "NumericalError",
           "SampleConfig", "State", "extract_motion", "invert_motion", "load_model", "motion_loss",
           "read_picture", "read_video", "sample", "save_model", "sparse_condition", "write_video"]
