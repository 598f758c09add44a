"""The page in the browser: its files, and Markdown as safe HTML. Knows no HTTP."""
