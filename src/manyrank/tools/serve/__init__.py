"""`manyrank serve`: a model behind the chat completions of OpenAI's API."""
