"""One module per checkpoint format: how its files and names map onto ``ArchSpec.iter_params``."""
