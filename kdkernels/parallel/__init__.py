"""Processes that share a vocabulary."""
