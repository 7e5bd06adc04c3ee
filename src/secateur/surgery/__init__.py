"""Make a plan permanent, one file per format."""

from secateur.surgery.compact import write_compact
from secateur.surgery.formats import FORMATS, check_export, format_named
from secateur.surgery.gguf import write_gguf
from secateur.surgery.hf import write_checkpoint
from secateur.surgery.peft import write_adapter
from secateur.surgery.pruned import check_ablation_fits
from secateur.surgery.uniform import write_uniform

__all__ = [
    "FORMATS",
    "check_ablation_fits",
    "check_export",
    "format_named",
    "write_adapter",
    "write_checkpoint",
    "write_compact",
    "write_gguf",
    "write_uniform",
]
