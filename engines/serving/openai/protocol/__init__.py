"""What OpenAI's protocol says: fields of requests, answers, errors."""
