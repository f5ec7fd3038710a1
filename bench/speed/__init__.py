"""Speed: load, encode, prefill, decode, time to the first token, memory, and the machine's own ceilings."""
