"""MotionClone in plain PyTorch: the motion of a reference video, in a new video of a prompt."""
from . import presets
from .checkpoints.from_state_dicts import model_from_state_dicts
from .checkpoints.model_file import load_model, save_model
from .clone import Clip, Reference, clone, read_reference
from .config import ModelConfig, SampleConfig
from .errors import InputError, NumericalError
from .guidance import Guidance, motion_guidance
from .inversion import InvertedReference, inversion_guidance, invert_reference
from .model import Model
from .motion import Motion, extract_motion, motion_loss
from .networks.attention import AttentionMaps, AttentionRequest
from .networks.sparsectrl import sparsectrl_condition
from .sampler import SamplerStep, sample
from .semantic import make_subject_masks, semantic_guidance
from .video.read import read_image, read_video
from .video.write import write_video

__version__ = "0.1.0"
__all__ = ["AttentionMaps", "AttentionRequest", "Clip", "Guidance", "InputError",
           "InvertedReference", "Model", "ModelConfig", "Motion", "NumericalError", "Reference",
           "SampleConfig", "SamplerStep", "clone", "extract_motion", "inversion_guidance",
           "invert_reference", "load_model", "make_subject_masks", "model_from_state_dicts",
           "motion_guidance", "motion_loss", "presets", "read_image", "read_reference",
           "read_video", "sample", "save_model", "semantic_guidance", "sparsectrl_condition",
           "write_video"]
