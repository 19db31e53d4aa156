"""B and C of the heads of a rotating state space model."""
