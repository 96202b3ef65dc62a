"""The command line: `trimpoint VERB`. Standard output is data, standard error is everything else."""

from trimpoint.cli.run import main

__all__ = ["main"]
