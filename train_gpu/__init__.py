"""Training: the two-stage recipe of LLaVA."""
