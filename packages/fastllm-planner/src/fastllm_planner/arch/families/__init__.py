"""One file per family: how its Hugging Face ``config.json`` maps onto ``ArchSpec`` and back."""
