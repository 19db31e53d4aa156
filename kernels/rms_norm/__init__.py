"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467)."""
