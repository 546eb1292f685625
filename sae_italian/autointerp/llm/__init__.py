"""Explanations and judgements by a language model behind any OpenAI-compatible endpoint."""
