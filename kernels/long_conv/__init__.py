"""S4's long convolution, its kernel from the poles, and the recurrence that they stand for (arXiv:2111.00396)."""
