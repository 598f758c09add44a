"""From token ids to events: text, reasoning, stop strings, tool calls."""
