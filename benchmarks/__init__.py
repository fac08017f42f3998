"""Measurement: every runner through the same interface."""
