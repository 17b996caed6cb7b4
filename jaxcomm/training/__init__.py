"""What a training job keeps: checkpoints, and its end on request."""
