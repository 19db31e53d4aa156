"""The state-space duality scan of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, sections 6 and 7)."""
