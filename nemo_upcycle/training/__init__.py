"""Reads what training runs leave behind: loss curves and their comparison."""
