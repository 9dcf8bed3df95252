"""From queries to bins and from bins to coefficients: points and offsets, the code, peeling, the joint fit."""
