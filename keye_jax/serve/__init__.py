"""An HTTP server in the shape of OpenAI's interface, for one engine."""
