"""Showing results: terminal tables, progress, charts, the web page. Everything is drawn from cards and records; no study is imported."""
