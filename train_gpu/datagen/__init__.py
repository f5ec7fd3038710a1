"""Instruction data from symbols: captions, class names, shapes."""
