"""What long work shares: the training loop, its log, checkpoints, seeds and stops; progress and several processes."""
