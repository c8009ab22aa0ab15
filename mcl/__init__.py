"""MotionClone in plain PyTorch: the motion of a reference video, in a new video of a prompt."""
from .checkpoints.model_file import load_model, save_model
from .config import ModelConfig, SampleConfig
from .checkpoints.from_state_dicts import model_from_state_dicts
from .errors import InputError, NumericalError
from .inversion import Inversion, inversion_guide, invert_motion
from .model import Model
from .motion import Guide, Motion, extract_motion, motion_guide, motion_loss
from .sampler import State, sample
from .semantic import semantic_guide, subject_of
from .networks.sparsectrl import sparse_condition
from .networks.temporal import Attended, Wanted
from .video.read import read_picture, read_video
from .video.write import write_video

__version__ = "0.1.0"
__all__ = ["Attended", "Guide", "InputError", "Inversion", "Model", "ModelConfig", "Motion",
           "NumericalError", "SampleConfig", "State", "Wanted", "extract_motion",
           "inversion_guide", "invert_motion", "load_model", "model_from_state_dicts",
           "motion_guide", "motion_loss", "read_picture", "read_video", "sample", "save_model",
           "semantic_guide", "sparse_condition", "subject_of", "write_video"]
