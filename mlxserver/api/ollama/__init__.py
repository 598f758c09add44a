"""Ollama's dialect: chat and generate as JSON lines, and its endpoints about models."""
