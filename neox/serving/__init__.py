"""A model behind HTTP: OpenAI's API and two older ones, a page, and limits on all of it."""
