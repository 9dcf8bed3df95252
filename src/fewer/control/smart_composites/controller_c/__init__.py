"""The predictive controller as C99: `mpc.h.in` and `mpc.c.in` with sizes, types and names filled in."""
