"""The gate of a SwiGLU."""
