"""Runtimes behind one interface."""
