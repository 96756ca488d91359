"""Batch norm and its relatives."""
