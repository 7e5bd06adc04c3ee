"""Make a plan permanent, one file per format."""

from secateur.surgery.hf import check_ablation_fits, write_checkpoint

__all__ = ["check_ablation_fits", "write_checkpoint"]
