"""How a checkpoint is made: degradation, patches, metrics."""
