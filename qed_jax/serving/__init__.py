"""An OpenAI-compatible server over the engine: HTTP, text and the thread that steps."""
