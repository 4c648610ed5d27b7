"""The HTTP server: an engine behind the OpenAI interface, and a page."""
