"""What pretraining and finetuning have in common: the loop, its log, its checkpoints, its random numbers, its end."""
