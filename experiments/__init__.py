"""The tables and figures of the results page."""
