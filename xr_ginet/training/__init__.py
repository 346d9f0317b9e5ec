"""How a checkpoint is made: degradation, metrics."""
