"""Make a plan permanent, one file per format."""

from secateur.surgery.hf import check_ablation_fits, write_checkpoint
from secateur.surgery.peft import write_adapter

__all__ = ["check_ablation_fits", "write_adapter", "write_checkpoint"]
