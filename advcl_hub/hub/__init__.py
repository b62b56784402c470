"""Where weights come from and go to: released ones, the Hugging Face Hub, folders that timm opens, checkpoints of others."""
