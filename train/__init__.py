"""What makes encoders: views, objective, pseudo-labels, the pretraining loop. Used from a checkout, not installed."""
