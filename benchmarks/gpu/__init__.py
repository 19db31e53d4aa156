"""Every kernel on an NVIDIA GPU: checked, and timed against floor and peers."""
