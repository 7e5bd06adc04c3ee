"""Make a plan permanent, one file per format."""

from secateur.surgery.hf import write_checkpoint

__all__ = ["write_checkpoint"]
