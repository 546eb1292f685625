"""Explainers that need no LLM, their rules, and the text of a rule."""
