"""Benchmarks: questions, answers, scores."""
