"""Plain checkpoints: a compressed model as an ordinary one of its family, with fewer experts and no code of ours."""

from hf_mcsmoe.export.calibrate import RouterFit
from hf_mcsmoe.export.checkpoint import export

__all__ = ["RouterFit", "export"]
