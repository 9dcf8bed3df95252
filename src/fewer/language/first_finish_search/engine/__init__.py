"""Rows that are sampled side by side in one model, and races among them: started, stepped and ended one by one."""
