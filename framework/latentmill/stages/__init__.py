"""The stages of the line: read, encode, denoise, decode, write."""
