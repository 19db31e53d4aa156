"""The recurrence of Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464)."""
