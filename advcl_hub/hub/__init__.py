"""Where weights come from and go to: released ones, the Hugging Face Hub, folders that timm opens, checkpoints of others."""

from advcl_hub.hub.export import export_folder, load_folder, verify_folder

__all__ = ["export_folder", "load_folder", "verify_folder"]
