"""S4's state space model, whose matrix is a diagonal plus a rank-one term: kernel and recurrence (arXiv:2111.00396)."""
