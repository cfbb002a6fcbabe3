"""What leaves: pushes to the Hub and the model card."""
