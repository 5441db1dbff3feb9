"""What is minimised: divergences, losses, the fused head."""
