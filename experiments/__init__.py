"""The tables and figures of the results page, one file each: `python -m experiments.NAME`."""
