"""Runners: inference runtimes behind one interface."""
