"""Lockstep's gauges, distances and verdict."""
