"""Anthropic's dialect: messages, token counts, models."""
