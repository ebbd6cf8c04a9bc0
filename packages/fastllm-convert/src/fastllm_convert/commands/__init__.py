"""One module per verb. They import click only; the work is imported inside the command."""
