"""Hugging Face directory <-> native checkpoint, tensor by tensor: no model is built, memory is about one tensor.

Nothing bears a final name until it is complete: an import fills a hidden folder that is renamed, then `latest` is written; an
export fills hidden shard files, renames them, and writes the index last. Safetensors only.
"""

from megatron_m1.checkpoint.hf_common import Plan
from megatron_m1.checkpoint.hf_export import export_hf, plan_export
from megatron_m1.checkpoint.hf_import import import_hf, plan_import
from megatron_m1.checkpoint.hf_verify import Verification, verify_hf

__all__ = ["Plan", "Verification", "export_hf", "import_hf", "plan_export", "plan_import", "verify_hf"]
