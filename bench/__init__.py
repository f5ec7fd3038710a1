"""Measure, compare, evaluate, report."""
